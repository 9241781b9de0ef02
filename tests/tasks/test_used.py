"""Which of the sites' updates have counted, round by round."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

from fedpool.messages import Used
from fedpool.tasks.record import RoundRecord
from fedpool.tasks.used import NONE_USED, Counted, first_weights
from tests.records import record_of


class Looked(Sequence[RoundRecord]):
    """Records that count how often one of them is read."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []
        self.num_looks = 0

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> RoundRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RoundRecord]: ...
    def __getitem__(self, index: Any) -> Any:
        found = self.records[index]
        self.num_looks += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self[:])


def a_round(number: int, task: str = "train", **weights: float) -> RoundRecord:
    accepted = [{"site": site, "weight": weight, "attempt": number % 2} for site, weight in weights.items()]
    return record_of({"task": task, "round": number, "accepted": accepted})


ROUNDS = (
    a_round(0, a=0.0, b=0.0),
    a_round(1, a=2.0, b=0.0, c=3.0),
    a_round(2, a=5.0, b=4.0),
    a_round(3, c=0.0),
    a_round(4, "evaluate", a=9.0, b=9.0),
)


def test_the_first_weight_and_the_last_update_of_each_site_count() -> None:
    counted = Counted({"c": 0.0, "a": 2.0})
    counted.follow(ROUNDS)
    assert counted.first_weights == {"a": 2.0, "b": 4.0, "c": 3.0}
    assert counted.used("abcd") == {
        "a": Used(round=2, attempt=0),
        "b": Used(round=2, attempt=0),
        "c": NONE_USED,
        "d": NONE_USED,
    }


def test_each_record_is_looked_at_once_and_comes_to_the_same() -> None:
    records, counted = Looked(), Counted({})
    for record in ROUNDS:
        records.records.append(record)
        counted.follow(records)
        assert counted.first_weights == first_weights(records.records, {})
    assert records.num_looks == len(ROUNDS)
    assert counted.used("c") == {"c": Used(round=1, attempt=1)}
