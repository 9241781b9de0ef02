"""What a work pool's state means for a run that waits in it."""

import pytest

from fedpool.tasks.reach import NO_WORKER, PAUSED, Pool

RESUME = "prefect work-pool resume a"


@pytest.mark.parametrize(
    ("pool", "resident", "begun", "hindrance"),
    [
        (Pool(offline=False), True, False, None),
        (Pool(offline=True), True, True, NO_WORKER),  # the worker did the round itself
        (Pool(offline=True), False, True, None),  # a container lives on without its worker
        (Pool(offline=True), False, False, NO_WORKER),
        (Pool(False, RESUME), True, False, PAUSED),
        (Pool(False, RESUME), True, True, None),  # what has begun goes on
        (Pool(True, RESUME), True, True, NO_WORKER),
    ],
)
def test_what_hinders_a_run(pool: Pool, resident: bool, begun: bool, hindrance: str | None) -> None:
    assert pool.hinders(resident=resident, begun=begun) == hindrance
