"""What the terminal shows about a job while it runs."""

from fedpool.deployments.progress import done_line


def test_the_line_of_a_round_reads_as_a_person_would_say_it() -> None:
    assert done_line("first", 1, "") == "first: 1 round done"
    assert done_line("first", 2, "accuracy 0.5000") == "first: 2 rounds done accuracy 0.5000"
