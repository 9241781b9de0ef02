"""The `fedpool-site` worker: a Prefect worker that runs `site_round` inside its own process, and nothing else.

What it is handed comes from outside the site: of a run it takes the four parameters of `site_round`, and checks them.
Entrypoint, pull steps, command, environment and job variables of the run's deployment are never looked at. A run of any
other flow is refused.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import anyio
import anyio.abc
import anyio.to_thread
import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.exceptions import ObjectNotFound, PrefectException, PrefectSignal
from prefect.states import Crashed, Pending
from prefect.utilities.engine import propose_state
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from fedpool.deployments.site_claim import SiteClaim
from fedpool.deployments.site_run import check_run, do_run
from fedpool.errors import ConfigError
from fedpool.flows.site_round import ENTRYPOINT, site_round
from fedpool.loopback import bypass_proxies
from fedpool.manifest import PROTOCOL
from fedpool.sites.config import CONFIG_VARIABLE, SiteConfig
from fedpool.sites.resident import Resident
from fedpool.tasks.reach import clock_ahead

_T = TypeVar("_T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CANCEL_POLL = timedelta(seconds=8)
_FAREWELL_S = 5.0
"""How long the server may take to forget a worker that stops."""
_SKEW_S = 5.0
"""From how many seconds on a clock that is off is worth a warning."""
_LOOK_PAUSE_S = 8.0
"""How long a worker that has further runs in hand leaves the server alone before it looks for more."""


class SiteWorkerResult(BaseWorkerResult):
    """How a run ended, as Prefect's worker wants to know it."""


class SiteWorker(BaseWorker[BaseJobConfiguration, BaseVariables, SiteWorkerResult]):
    """Runs a site's rounds in this process, and keeps each job's session warm between them.

    Args:
        work_pool_name: the pool to poll; it belongs to one site.
        config: of the site; default: from the environment, the pool's name for its name.
    """

    type = "fedpool-site"
    _description = "Runs the rounds of one federated learning site, and nothing else."
    _logo_url = ""
    _documentation_url = ""

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """The work pool's template: there is nothing to set, and nothing that the server has to check with every run."""
        return {}

    def __init__(self, work_pool_name: str, *args: Any, config: SiteConfig | None = None, **kwargs: Any) -> None:
        bypass_proxies()  # before there is a client
        if config is None:
            file = os.environ.get(CONFIG_VARIABLE)
            name = {} if file or "FEDPOOL_SITE_NAME" in os.environ else {"name": work_pool_name}
            config = SiteConfig.load(Path(file) if file else None, pool=work_pool_name, **name)
        config.check_devices()
        self.site = config
        # A name that lasts over restarts: by it the worker knows the runs that it left behind when it was killed.
        kwargs["name"] = kwargs.get("name") or config.name
        super().__init__(work_pool_name, *args, **kwargs)
        self._stops: dict[UUID, threading.Event] = {}
        self._flow_names: dict[UUID, str] = {}
        self._looked = 0.0
        self._resident: Resident | None = None
        self._away = False
        self._claim = SiteClaim(config.name, self.name, work_pool_name, tell=lambda line: self._logger.info(line))
        self._registered = False
        self._watching: anyio.CancelScope | None = None
        self._stop: Callable[[], None] | None = None
        """Ends the worker in order."""
        self._superseded: ConfigError | None = None

    async def start(self, *args: Any, **kwargs: Any) -> None:
        """See `BaseWorker.start`. SIGTERM and SIGINT end it in order; a second one ends it at once.

        Prefect makes them a KeyboardInterrupt wherever the main thread happens to be, and some of what it calls there
        takes that for an error of its own and goes on.

        Raises:
            ConfigError: another process serves the site.
        """
        if threading.current_thread() is not threading.main_thread():
            return await super().start(*args, **kwargs)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
            task.cancel()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop)
        self._stop = stop
        try:
            await super().start(*args, **kwargs)
        except asyncio.CancelledError:
            if not stopped:
                raise
            task.uncancel()
            if self._superseded is not None:
                raise self._superseded from None
            self._logger.info("site %s has stopped", self.site.name)
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def setup(self) -> None:
        """Open the site, and reach the server if it is there.

        Raises:
            ConfigError: another process serves the site.
        """
        self._resident = Resident(self.site)
        try:
            await super().setup()
        except BaseException:
            await self.teardown(None, None, None)
            raise

    async def teardown(self, *exc_info: Any) -> None:
        """End every script first: the runs that wait for them end as crashed, and are handed back. Then the worker's record
        goes, so that the site is offline at once.
        """
        with anyio.CancelScope(shield=True):
            if self._resident is not None:
                await anyio.to_thread.run_sync(self._resident.close)
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        try:
            await super().teardown(*exc_info)
        finally:
            await self._give_up_claim()

    async def _give_up_claim(self) -> None:
        # After all that sends heartbeats has ended, which would bring the record back; so with a client of its own.
        with anyio.move_on_after(_FAREWELL_S, shield=True):
            try:
                async with get_client() as client:
                    await self._claim.release(client)
            except (httpx.HTTPError, PrefectException) as error:
                self._logger.warning("the worker's record stays on the Prefect server for a while: %s", error)

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """See `BaseWorker.get_and_submit_flow_runs`; a server that is unreachable is waited for.

        With runs in hand that wait for their rounds there is no hurry to find the ones after them, and a server that has many
        sites would do little else than answer them all.
        """
        now = time.monotonic()
        if len(self._stops) > 1 and now - self._looked < _LOOK_PAUSE_S:
            return []
        self._looked = now
        return await self._patiently(super().get_and_submit_flow_runs()) or []

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        """See `BaseWorker._get_scheduled_flow_runs`, which asks for what is due by this machine's clock: a site's run is due as
        soon as it is there, whatever time the site, or the coordinator, takes it to be.
        """
        try:
            found: list[WorkerFlowRunResponse] = await self.client.get_scheduled_flow_runs_for_work_pool(
                work_pool_name=self._work_pool_name, work_queue_names=list(self._work_queues)
            )
        except ObjectNotFound:  # the pool is made by the next heartbeat
            return []
        return found

    async def _sync_and_initialize(self) -> None:
        await self._patiently(self._claim_and_sync())

    async def _claim_and_sync(self) -> None:
        try:
            if await self._claim.hold(self.client):
                self._registered = False  # nor does a server that knew nothing of the claim know the site
        except ConfigError as error:
            if not self.is_setup or self._stop is None:
                raise
            self._superseded = error  # Prefect's loops would make a group of it, and of what it ends
            self._stop()
            return
        await super()._sync_and_initialize()

    async def _patiently(self, request: Awaitable[_T]) -> _T | None:
        """Await a request; None when the server is unreachable: Prefect's loops would give up after a while and end scripts."""
        try:
            answer = await request
            if self._away:
                await self.client.hello()  # Prefect may have asked for nothing just now
        except httpx.TransportError as error:
            self._note_away(error)
            return None
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
            self._note_away(error)
            return None
        if self._away:
            self._logger.info("the Prefect server answers again")
            self._away = False
        return answer

    def _note_away(self, error: httpx.HTTPError) -> None:
        if not self._away:
            self._logger.warning("the Prefect server is unreachable, trying again until it answers: %s", error)
            self._away = True

    async def _initialize_after_sync(self) -> None:
        if not self._registered and self._work_pool is not None:
            await register_site(self.client, self.site.name, self._work_pool_name)
            await self._hand_back_orphans()
            await self._compare_clocks()
            self._registered = True
        if self._watching is None and self._registered:
            assert self._runs_task_group is not None
            self._watching = anyio.CancelScope()
            self._runs_task_group.start_soon(self._watch_for_cancellation, self._watching)
        await super()._initialize_after_sync()

    async def _compare_clocks(self) -> None:
        """Say how far this machine's clock is off: nothing here goes by it, but others do, such as an object store."""
        ahead_s = (await clock_ahead(self.client)).total_seconds()
        if abs(ahead_s) >= _SKEW_S:
            self._logger.warning(
                "this machine's clock is %.0f s %s the Prefect server's. Rounds do not depend on it; object stores refuse "
                "requests that are 15 minutes off: set the clock",
                abs(ahead_s),
                "ahead of" if ahead_s > 0 else "behind",
            )

    async def _hand_back_orphans(self) -> None:
        """Mark what this worker was doing when it was killed as crashed: nobody else knows that it is lost."""
        runs = await self.client.read_flow_runs(
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self._work_pool_name])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(
                    type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
                )
            ),
        )
        for run in runs:
            if run.state is not None and run.state.message == self._note and run.id not in self._stops:
                self._logger.warning("run %s was left behind when this worker ended: it has crashed", run.name)
                state: State[Any] = Crashed(message=f"the worker of {self.site.name} was lost while it did its part")
                await self.client.set_flow_run_state(run.id, state, force=True)

    async def _watch_for_cancellation(self, scope: anyio.CancelScope) -> None:
        """Stop the runs that someone cancels in the UI; when a job ends, the site learns it from the store."""
        with scope:
            while True:
                await anyio.sleep(_CANCEL_POLL.total_seconds())
                if self._stops:
                    await self._stop_cancelled()

    async def _stop_cancelled(self) -> None:
        try:
            runs = await self.client.read_flow_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(self._stops)))
            )
        except (httpx.HTTPError, PrefectException) as error:  # it is unreachable: the next look may find it
            self._logger.debug("could not look for cancelled runs: %s", error)
            return
        for run in runs:
            cancelled = run.state is not None and (run.state.is_cancelling() or run.state.is_cancelled())
            if cancelled and (stop := self._stops.get(run.id)) is not None:
                stop.set()

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> SiteWorkerResult:
        """Run `site_round` with the parameters of a run, whatever else its deployment asks for."""
        assert self._resident is not None
        check_run(await self._flow_name(flow_run.flow_id), flow_run.parameters)
        stop = self._stops[flow_run.id] = threading.Event()
        if task_status is not None:
            task_status.started(os.getpid())
        try:
            await do_run(self.client, flow_run, self._resident, stop=stop, note=self._note)
        finally:
            del self._stops[flow_run.id]
        return SiteWorkerResult(identifier=str(flow_run.id), status_code=0)

    @property
    def _note(self) -> str:
        """The message of the states of a run that this worker has in hand."""
        return f"in the hands of worker {self.name}"

    async def _flow_name(self, flow_id: UUID) -> str:
        if flow_id not in self._flow_names:
            self._flow_names[flow_id] = (await self.client.read_flow(flow_id)).name
        return self._flow_names[flow_id]

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """See `BaseWorker._submit_run`, which prepares what a run's deployment asks for, and tells the server much of it."""
        try:
            if await self._propose_pending_state(flow_run):
                assert self._runs_task_group is not None
                self._runs_task_group.start_soon(self._run_in_hand, flow_run)
            else:
                self._release_limit_slot(flow_run.id)
        finally:
            self._submitting_flow_run_ids.remove(flow_run.id)

    async def _propose_pending_state(self, flow_run: FlowRun) -> bool:
        """Claim a run; False when it is not to be had, because it was cancelled, or another worker was faster."""
        try:
            state: State[Any] = await propose_state(self.client, Pending(message=self._note), flow_run_id=flow_run.id)
        except (PrefectSignal, PrefectException, httpx.HTTPError) as error:  # a run that is still there is found again
            self._logger.info("run %s was not taken: %s", flow_run.name, error)
            return False
        return state.is_pending()

    async def _run_in_hand(self, flow_run: FlowRun) -> None:
        try:
            await self.run(flow_run, BaseJobConfiguration())
        except Exception as error:
            self._logger.exception("run %s could not be done", flow_run.name)
            await self._propose_crashed_state(flow_run, f"{type(error).__name__}: {error}")
        finally:
            self._release_limit_slot(flow_run.id)


async def register_site(client: Any, site: str, pool: str) -> UUID:
    """Create or renew the deployment `site-round/SITE`, by which coordinators reach a site.

    Args:
        client: a Prefect client.
        pool: the site's work pool, of any type.
    """
    deployment: UUID = await client.create_deployment(  # one of that name is replaced
        flow_id=await client.create_flow(site_round),
        name=site,
        version=str(PROTOCOL),
        description=f"How coordinators reach {site}. Its version is the protocol that the site speaks.",
        work_pool_name=pool,
        entrypoint=ENTRYPOINT,
        tags=["fedpool"],
    )
    return deployment
