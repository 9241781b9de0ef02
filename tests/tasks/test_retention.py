"""How long updates are kept: which rounds' updates are outdated, and when."""

import pytest

from fedpool.tasks.retention import KeepUpdates, outdated
from tests.records import record_of

RECORDS = [
    record_of({"round": round, "task": task})
    for round, task in enumerate(["train", "train", "evaluate", "submit_model", "evaluate"])
]


@pytest.mark.parametrize(("keep", "rounds"), [("all", []), ("last", [0, 3]), ("none", [0, 1, 3])])
def test_submitted_models_go_with_updates_because_they_lie_in_the_store_once_more(
    keep: KeepUpdates, rounds: list[int]
) -> None:
    assert [record.round for record in outdated(RECORDS, keep)] == rounds
