"""The `fedpool-coordinator` worker, which runs jobs, each in a process of its own.

Both Prefect's command and ours start it. Anyone who can create a deployment can send it runs. It
takes only the parameters from a run, and from its deployment the entrypoint, which must name one of
the flows in `fedpool.flows.entrypoints`. The pull steps, command, environment, working directory,
image and other job variables of the deployment, of the run and of the work pool's template are
ignored. It never loads the flow that a deployment names, not even to cancel a run. Code that a job
brings needs the operator's permission (`fedpool.allowed_code`), as everywhere.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from fedpool.backend import normal_url
from fedpool.deployments.signals import ended_by_signals
from fedpool.errors import ConfigError
from fedpool.flows.recipes import entrypoint_name
from fedpool.loopback import bypass_proxies
from fedpool.tasks.prefect_internals import run_in_process
from fedpool.tasks.reach import COORDINATOR_TYPE, wrong_type
from fedpool.tasks.run_states import report_state


class CoordinatorConfiguration(BaseJobConfiguration):
    """What a run, its deployment and its work pool may set of the job's process: nothing."""

    @classmethod
    async def from_template_and_values(
        cls, base_job_template: dict[str, Any], values: dict[str, Any], client: Any = None
    ) -> "CoordinatorConfiguration":
        """See `BaseJobConfiguration.from_template_and_values`; ignores both."""
        return cls()


class CoordinatorResult(BaseWorkerResult):
    """The outcome of a run; required by Prefect's worker."""


class CoordinatorWorker(BaseWorker[CoordinatorConfiguration, BaseVariables, CoordinatorResult]):
    """Runs fedpool's jobs, each in a process of its own, and nothing else.

    Args:
        work_pool_name: the pool to poll.
        stores: URLs of the stores that jobs may be in; empty: any.
        options: see `BaseWorker`.
    """

    type = COORDINATOR_TYPE
    job_configuration = CoordinatorConfiguration
    _description = "Runs the jobs of federated learning, and no other flow."
    _logo_url = ""
    _documentation_url = ""

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """The work pool's template: empty, so the server has nothing to check for a run."""
        return {}

    def __init__(self, work_pool_name: str, *, stores: Sequence[str] = (), **options: Any) -> None:
        bypass_proxies()  # before a client is created
        super().__init__(work_pool_name, **options)
        self._pool = work_pool_name
        self._stores = [normal_url(store) for store in stores]
        self._is_checked = False

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Run jobs. SIGTERM and SIGINT end the worker and its jobs, which can be resumed.

        Args:
            run_once: do only the work that is there now.
            with_healthcheck: start a server that tells whether the worker still looks for work.
            printer: called when the worker has started, and when it has stopped.

        Raises:
            ConfigError: the work pool has another type.
        """
        with ended_by_signals():
            await super().start(run_once, with_healthcheck, printer)

    async def sync_with_backend(self) -> None:
        """See `BaseWorker.sync_with_backend`. The first time, it checks the pool's type.

        Raises:
            ConfigError: the work pool has another type.
        """
        if not self._is_checked:
            try:
                pool = await self.client.read_work_pool(self._pool)
            except ObjectNotFound:  # it is created now
                pool = None
            if pool is not None and pool.type != self.type:
                raise ConfigError(wrong_type(self._pool, pool.type))
            self._is_checked = True
        await super().sync_with_backend()

    async def run(
        self, flow_run: FlowRun, configuration: CoordinatorConfiguration, task_status: Any = None
    ) -> CoordinatorResult:
        """Run a job to its end, or refuse it: then its run has crashed, with the reason."""
        try:
            command = [sys.executable, "-P", "-m", "fedpool.deployments.job_process", await self._flow_name(flow_run)]
            self._check_store(flow_run)
        except ConfigError as refused:
            self.get_flow_run_logger(flow_run).error("%s", refused)
            await report_state(self.client, Crashed(message=str(refused)), flow_run.id)
            task_status.started("refused")
            return CoordinatorResult(identifier="refused", status_code=0)

        async def crashed() -> None:
            await _believe_the_store(flow_run)

        with tempfile.TemporaryDirectory(prefix="fedpool-job-") as folder:
            pid, status = await run_in_process(
                flow_run, command, folder=folder, crashed=crashed, started=task_status.started
            )
        return CoordinatorResult(identifier=str(pid), status_code=status)

    async def _flow_name(self, run: FlowRun) -> str:
        """The name in `fedpool.flows.entrypoints` of the flow of a run's deployment."""
        entrypoint = None
        if run.deployment_id is not None:
            entrypoint = (await self.client.read_deployment(run.deployment_id)).entrypoint
        name = entrypoint_name(entrypoint or "")
        if name is None:
            raise ConfigError(
                f"this coordinator runs only fedpool's recipes, but the entrypoint of this run's deployment is {entrypoint!r}: "
                "deploy a recipe with recipe.deploy, or run it with recipe.execute"
            )
        return name

    def _check_store(self, run: FlowRun) -> None:
        store = str(run.parameters.get("store", ""))
        if self._stores and normal_url(store) not in self._stores:
            raise ConfigError(
                f"the run names the store {store!r}, but this coordinator runs only jobs in {', '.join(self._stores)}: correct "
                "the store of the environment that submits the job, or --store of `fedpool coordinator start`"
            )


async def _believe_the_store(run: FlowRun) -> None:
    """See `overlap.believe_the_store`. The run may have been named after its job since it began."""
    from fedpool.flows.overlap import believe_the_store

    async with get_client() as client:
        await believe_the_store(client, await client.read_flow_run(run.id))
