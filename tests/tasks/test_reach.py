"""What a work pool's state means for a run that waits in it."""

import pytest

from fedpool.tasks.reach import NO_WORKER, PAUSED, Pool


@pytest.mark.parametrize(
    ("pool", "resident", "begun", "hindrance"),
    [
        (Pool(paused=False, offline=False), True, False, None),
        (Pool(paused=False, offline=True), True, True, NO_WORKER),  # the worker did the round itself
        (Pool(paused=False, offline=True), False, True, None),  # a container lives on without its worker
        (Pool(paused=False, offline=True), False, False, NO_WORKER),
        (Pool(paused=True, offline=False), True, False, PAUSED),
        (Pool(paused=True, offline=False), True, True, None),  # what has begun goes on
        (Pool(paused=True, offline=True), True, True, NO_WORKER),
    ],
)
def test_what_hinders_a_run(pool: Pool, resident: bool, begun: bool, hindrance: str | None) -> None:
    assert pool.hinders(resident=resident, begun=begun) == hindrance
