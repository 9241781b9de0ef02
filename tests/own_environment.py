"""A custom environment in one file: its sites are sessions in this process, such as functions. It
also shows, in a few lines, a region: a session that answers for its own sites.

CONTRIBUTING.md points here.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedpool import FedAvgRecipe, Run
from fedpool.arrays import load_arrays, save_and_hash
from fedpool.client.hosts import Assignment
from fedpool.environment import ANEW, Begin, Environment
from fedpool.filter_field import read_filters
from fedpool.filters import Filter
from fedpool.flows.job import federated_job
from fedpool.flows.staging import start_of
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.recipe import Recipe
from fedpool.sites.output import LogLine
from fedpool.sites.session import END_GRACE_S, Reply, Session
from fedpool.sites.site_round import Delivery, SiteFolder, run_site_round
from fedpool.sites.sites import SIMULATED, Sites, Traits
from fedpool.store import Store
from fedpool.tasks.prefect_internals import drain

Params = Mapping[str, np.ndarray[Any, Any]]


class SessionSites(Sites):
    """Sites whose sessions are objects in this process."""

    traits: ClassVar[Traits] = SIMULATED
    __slots__ = ("_cancelled", "_filters", "_folder", "_job", "_sessions", "_store", "names", "num_slots")

    def __init__(self, sessions: Mapping[str, Session], folder: Path) -> None:
        self.names = tuple(sessions)
        self.num_slots = len(sessions)
        self._sessions = sessions
        self._folder = folder
        self._cancelled = False
        self._filters: tuple[Filter, ...] = ()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def endings(self) -> Mapping[str, str]:
        return {}

    def open(self, job: ClientJob, store: Store) -> None:
        self._job, self._store, self._filters = job, store, read_filters(job.filters)

    async def announce(self, site: str, round: int, attempt: int) -> bool:
        return True

    async def unreachable(self, sites: Collection[str]) -> Mapping[str, str]:
        return {}

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        folder = self._folder / assignment.site
        folder.mkdir(parents=True, exist_ok=True)
        return await asyncio.to_thread(
            run_site_round,
            self._job,
            assignment,
            session=self._sessions[assignment.site],
            store=self._store,
            folder=SiteFolder(folder, folder, folder / "kept"),
            deadline=deadline,
            log=log,
            filters=self._filters,
        )

    def cancel(self) -> None:
        self._cancelled = True
        for session in self._sessions.values():
            session.kill()

    async def end(self) -> None:
        for session in self._sessions.values():
            session.end()


@dataclass(frozen=True)
class SessionEnv(Environment[Run]):
    """Runs a recipe at sites that are sessions in this process."""

    sessions: Mapping[str, Session]
    workspace: Path

    def execute(self, recipe: Recipe, begin: Begin = ANEW, *, wait: bool = True) -> Run:
        store = Store(self.workspace)
        start = start_of(recipe, store, begin)
        recipe.check_sites(tuple(self.sessions))
        sites = SessionSites(self.sessions, self.workspace / ".sites" / start.job_id)

        async def run_job() -> None:
            await federated_job(start.recipe, start.job_id, store.url, sites, start.resumes, return_state=True)

        def work() -> None:
            try:
                asyncio.run(run_job())
            finally:
                drain(10.0)  # what Prefect's log still has to send

        run = Run(start.job_id, store, work=work, cancel=sites.cancel)
        if wait:
            run.wait()
        return run


class FunctionSession:
    """A site that is a function: it takes the global model and returns the site's model.

    Args:
        weight: the weight of its update.
    """

    def __init__(self, train: Callable[[Params], Params], weight: float) -> None:
        self._train = train
        self._weight = weight
        self.killed = False

    def perform(self, assignment: Assignment, *, deadline: float | None, log: LogLine) -> Reply:
        assert assignment.model is not None
        return reply(assignment, self._train(load_arrays(assignment.model, "numpy")), self._weight)

    def end(self, grace_s: float = END_GRACE_S) -> str | None:
        return None

    def kill(self) -> None:
        self.killed = True


class Region(FunctionSession):
    """A region: a single site to the job above it. For each assignment, it runs a job of one round
    at its own sites. Its update weighs as much as theirs together.
    """

    def __init__(self, name: str, sessions: Mapping[str, Session], workspace: Path, script: Path) -> None:
        self._name = name
        self._env = SessionEnv(sessions, workspace)
        self._script = script
        self.killed = False

    def perform(self, assignment: Assignment, *, deadline: float | None, log: LogLine) -> Reply:
        assert assignment.model is not None
        recipe = FedAvgRecipe(
            name=self._name,
            min_clients=len(self._env.sessions),
            num_rounds=1,
            model=load_arrays(assignment.model, "numpy"),
            train_script=self._script,
            final_evaluation=False,
        )
        result = recipe.execute(env=self._env).get_result()
        weight = sum(update["weight"] for update in result.rounds[-1]["accepted"])
        return reply(assignment, result.params, weight)


def reply(assignment: Assignment, params: Params, weight: float) -> Reply:
    """Write a site's model to the assignment's path, and return a reply with its weight."""
    assert assignment.update is not None
    with Path(assignment.update).open("wb") as file:
        save_and_hash(file, dict(params))
    return Reply({"params_type": "FULL", "metrics": {}, "meta": {"NUM_STEPS_CURRENT_ROUND": weight}}, {})
