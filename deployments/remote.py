"""Running a recipe at sites behind work pools: stage the job, submit it, follow it.

Everything that is missing is reported before anything is submitted, as far as it can be known.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import ConfigDict, Field

from fedpool.deployments.api import open_client
from fedpool.deployments.blocking import run_blocking
from fedpool.deployments.handle import Run
from fedpool.deployments.job_runs import check_has_ended
from fedpool.deployments.overlap import Overlap, chosen
from fedpool.deployments.progress import show
from fedpool.deployments.recipe_deployment import make_deployment
from fedpool.deployments.remote_checks import check, probe
from fedpool.deployments.schedules import parse_schedule
from fedpool.deployments.terminal import open_console
from fedpool.deployments.tracked import Tracked
from fedpool.environment import ANEW, Begin
from fedpool.flows.own_code import check_strategy, check_travels
from fedpool.flows.staging import Start, check_unchanged, has_completed, stage, start_of
from fedpool.loopback import bypass_proxies
from fedpool.paths import JobPaths, new_job_id
from fedpool.recipe import Recipe
from fedpool.store import Store
from fedpool.tasks.job_record import EnvironmentRecord
from fedpool.tasks.track import check_places

if TYPE_CHECKING:
    from prefect.schedules import Schedule

COORDINATOR_POOL = "fedpool-coordinator"


class RemoteEnv(Tracked):
    """The base of a proof of concept and of production: a Prefect server, a store, work pools."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    coordinator_pool: str = Field(default=COORDINATOR_POOL, description="work pool that runs the jobs' flows")
    look_ahead: int = Field(
        default=4, description="number of rounds that are announced to the sites ahead of the current one", ge=0, le=100
    )
    progress: bool = Field(default=True, description="show progress and a summary in the terminal")

    @abstractmethod
    def site_names(self, recipe: Recipe) -> tuple[str, ...]:
        """Names of the sites that a recipe runs at."""

    @abstractmethod
    def open_store(self) -> Store:
        """The store, opened from this process."""

    @abstractmethod
    def settings(self) -> dict[Any, Any]:
        """Prefect settings with which this process reaches the server."""

    def recorded(self) -> EnvironmentRecord:
        """The record for `job.json`, with which `fedpool job resume` continues the job.

        It has no secrets, and no addresses except those of trackers.
        """
        settings = self.model_dump(mode="json", include={"coordinator_pool", "look_ahead"})
        return EnvironmentRecord(type=type(self).__name__, settings=settings | self.tracking())

    def prepare(self, recipe: Recipe) -> None:
        """Prepare to run a recipe; does nothing by default."""

    @property
    def server_remedy(self) -> str | None:
        """What to do if the server does not answer; None: the usual remedy."""
        return None

    def execute(self, recipe: Recipe, begin: Begin = ANEW, *, wait: bool = True) -> Run:
        """Run a recipe.

        Args:
            recipe: the recipe to run.
            begin: how the job begins.
            wait: show the job's progress and return when it has ended. If False, return once it is
                submitted.

        Returns: a handle on the job. If the job fails, the handle reports that (`get_status`,
        `get_result`); nothing is raised here.

        Raises:
            RecipeError: recipe and environment do not match.
            ConfigError, ServerError, StoreError: the job lacks something that it needs, and was not
                submitted.
            KeyboardInterrupt: Ctrl-C; the job is cancelled first.
        """
        names = self._checked_names(recipe)
        console = open_console(quiet=not self.progress)
        for note in recipe.bundle.notes:
            console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
        store = self._ready_store(recipe)
        start = start_of(recipe, store, begin)
        recipe, job_id = start.recipe, start.job_id
        if start.resumes:
            check_unchanged(recipe, job_id, store, names)
            if has_completed(store, job_id):
                return Run(job_id, store, work=lambda: None, cancel=lambda: None)

        with self._applied():
            run_id = run_blocking(self._submit(start, store, names))
        run = Run(job_id, store, work=lambda: self._follow(run_id, store, job_id), cancel=lambda: self._cancel(run_id))
        if wait:
            show(run, recipe, len(names), console)
        return run

    def deploy(
        self,
        recipe: Recipe,
        *,
        schedule: str | timedelta | Sequence[str | timedelta] | None = None,
        warm_start: bool = False,
        overlap: Overlap | None = None,
    ) -> str:
        """Register the recipe as the deployment `federated-job/NAME`; each run of it is a new job.

        Args:
            schedule: when it runs by itself: a cron line ("0 2 * * 0"), a recurrence rule
                ("FREQ=..."), an interval, or a list of these.
            warm_start: start each job from the final model of the last completed one.
            overlap: what to do with a run, scheduled or not, that is due while another one is in
                progress: skip it ("skip"), let it wait ("queue"), or cancel the other one
                ("cancel"). Default: "skip" with a schedule; without one, runs may overlap.

        Returns: the deployment's name, for `prefect deployment run`.

        Raises:
            RecipeError, ConfigError, ServerError, StoreError: as for `execute`.
        """
        names = self._checked_names(recipe)
        overlap = chosen(overlap, scheduled=schedule is not None)
        schedules = [parse_schedule(entry) for entry in ([] if schedule is None else _listed(schedule))]
        store = self._ready_store(recipe)
        with self._applied():
            run_blocking(self._register(recipe, store, names, schedules, warm_start=warm_start, overlap=overlap))
        return f"federated-job/{recipe.name}"

    def _checked_names(self, recipe: Recipe) -> tuple[str, ...]:
        """The sites' names, after checking that the recipe can run there."""
        bypass_proxies()
        names = self.site_names(recipe)
        recipe.check_sites(names)
        check_strategy(recipe, len(names))
        check_travels(recipe)
        return names

    def _ready_store(self, recipe: Recipe) -> Store:
        """The store, after checking that it is writable."""
        self.prepare(recipe)
        store = self.open_store()
        probe(store)
        check_places(self.track, is_local=store.is_local)
        return store

    async def _submit(self, start: Start, store: Store, names: tuple[str, ...]) -> UUID:
        """Stage or resume a job, and submit it to the coordinator's pool; returns its run's id."""
        from prefect.states import Scheduled

        from fedpool.tasks.reach import clock_ahead

        recipe, job_id = start.recipe, start.job_id
        async with open_client(self.server_remedy) as client:
            await check(client, names, self.coordinator_pool)
            if start.resumes:
                await check_has_ended(client, job_id)
                await asyncio.to_thread(store.remove, JobPaths(job_id).result)
            else:
                await asyncio.to_thread(
                    partial(stage, parent=start.parent, environment=self.recorded()), recipe, job_id, store, names
                )
            deployment = await make_deployment(client, recipe, None, pool=self.coordinator_pool, parameters={})
            run = await client.create_flow_run_from_deployment(
                deployment,
                name=job_id,
                parameters=self._parameters(recipe, store, names) | {"job_id": job_id},
                # Due now by the server's clock. With a clock that is ahead, the run would be due
                # later, and wait silently.
                state=Scheduled(scheduled_time=datetime.now(UTC) - await clock_ahead(client)),
            )
            return run.id

    async def _register(
        self,
        recipe: Recipe,
        store: Store,
        names: tuple[str, ...],
        schedules: Sequence["Schedule"],
        *,
        warm_start: bool,
        overlap: Overlap | None,
    ) -> None:
        """Stage a template, and create the deployment whose runs start from it."""
        template = new_job_id(recipe.name)
        async with open_client(self.server_remedy) as client:
            await check(client, names, self.coordinator_pool)
            await asyncio.to_thread(
                partial(stage, template=True, environment=self.recorded()), recipe, template, store, names
            )
            parameters = self._parameters(recipe, store, names) | {
                "template": template,
                "warm_start": warm_start,
                "cancel_earlier": overlap == "cancel",
            }
            await make_deployment(
                client,
                recipe,
                recipe.name,
                pool=self.coordinator_pool,
                parameters=parameters,
                schedules=schedules,
                overlap=overlap,
            )

    @contextmanager
    def _applied(self) -> Iterator[None]:
        from prefect.settings import temporary_settings

        with temporary_settings(self.settings()):
            yield

    def _parameters(self, recipe: Recipe, store: Store, names: Sequence[str]) -> dict[str, Any]:
        from fedpool.flows.deployed import form_fields

        fields = recipe.model_dump(mode="json", include=set(form_fields(type(recipe))))
        return {
            "store": store.url,
            "sites": list(names),
            "look_ahead": self.look_ahead,
            "track": list(self.track),
            **fields,
        }

    def _cancel(self, run_id: UUID) -> None:
        from fedpool.deployments.following import cancel_run

        async def cancel() -> None:
            async with open_client(self.server_remedy) as client:
                await cancel_run(client, run_id)

        with self._applied():
            run_blocking(cancel())

    def _follow(self, run_id: UUID, store: Store, job_id: str) -> None:
        """Wait for the job's flow run to end; raises if it ended without a result."""
        from prefect.client.orchestration import get_client

        from fedpool.deployments.following import follow

        async def wait() -> None:
            async with get_client() as client:
                await follow(client, run_id, store, job_id)

        with self._applied():
            run_blocking(wait())


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
