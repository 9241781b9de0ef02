"""Anything that implements `Session` can do a site's part of a round, client script or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool.arrays import load_arrays, save_and_hash
from fedpool.client.hosts import Assignment
from fedpool.errors import SiteError
from fedpool.messages import SiteAssignment
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.sites.session import END_GRACE_S, Reply, Session
from fedpool.sites.site_round import SiteFolder, run_site_round
from fedpool.store import Store
from tests.updates import client_job

PATHS = JobPaths("job-1")


class Region:
    """A session without a script: it answers with the mean of what its own sites would have sent,
    and fails as often as it's told to.
    """

    def __init__(self, steps: list[float], failures: int = 0) -> None:
        self.steps = steps
        self.failures = failures
        self.killed = False

    def perform(self, assignment: Assignment, *, deadline: float | None, log: LogLine) -> Reply:
        if self.failures:
            self.failures -= 1
            raise SiteError("north", assignment.round, "none of its sites answered")
        assert assignment.model is not None and assignment.update is not None
        model = load_arrays(assignment.model, "numpy")
        with Path(assignment.update).open("wb") as file:
            save_and_hash(file, {name: value + np.mean(self.steps) for name, value in model.items()})
        log(f"{len(self.steps)} sites")
        update = {"params_type": "FULL", "metrics": {}, "meta": {"NUM_STEPS_CURRENT_ROUND": len(self.steps)}}
        return Reply(update, {"spread": float(np.ptp(self.steps))})

    def end(self, grace_s: float = END_GRACE_S) -> str | None:
        return None

    def kill(self) -> None:
        self.killed = True


def run(folder: Path, session: Session, lines: list[str], restarts: int = 0) -> tuple[Store, Any]:
    store = Store(folder / "store")
    with store.staged(PATHS.global_model(0)) as file:
        base = save_and_hash(file, {"w": np.zeros(2)})
    job = client_job(restarts=restarts)
    assignment = SiteAssignment(
        site="north", round=0, task="train", base_sha256=base.sha256, base_size=base.size, timeout_s=None
    )
    site = SiteFolder(folder, folder, folder / "kept")
    return store, run_site_round(
        job, assignment, session=session, store=store, folder=site, deadline=None, log=lines.append
    )


def test_what_a_session_without_a_script_answers_is_committed_as_a_sites_update(tmp_path: Path) -> None:
    lines: list[str] = []
    store, delivery = run(tmp_path, Region([1.0, 3.0]), lines)
    assert (delivery.manifest.weight, delivery.manifest.logged, lines) == (2.0, {"spread": 2.0}, ["2 sites"])
    sent = load_arrays(store.full(PATHS.update(0, "north", 0)), "numpy")
    assert sent["w"].tolist() == [2.0, 2.0]


def test_a_session_that_fails_is_asked_again_as_often_as_the_job_says(tmp_path: Path) -> None:
    lines: list[str] = []
    _, delivery = run(tmp_path, Region([1.0], failures=1), lines, restarts=1)
    assert delivery.manifest.weight == 1.0
    assert lines == ["the script is restarted, because it failed: none of its sites answered", "1 sites"]


def test_a_session_that_was_killed_is_not_asked_again(tmp_path: Path) -> None:
    region = Region([1.0], failures=1)
    region.kill()
    with pytest.raises(SiteError, match="none of its sites answered"):
        run(tmp_path, region, [], restarts=1)
