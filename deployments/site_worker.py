"""The `fedpool-site` worker, which serves a site inside its own process.

Both Prefect's command and ours start it. Its input comes from outside the site: it takes the five
parameters of `site_round` from a run, and checks them. The entrypoint, pull steps, command,
environment and job variables of the run's deployment are ignored. Runs of other flows are refused.
It has the name and the settings of a Prefect worker, but its work is done by `SiteService` at a
`PrefectDesk`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.logging import get_logger
from prefect.settings import PREFECT_API_URL, PREFECT_WORKER_QUERY_SECONDS
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from fedpool.deployments.prefect_desk import Counter, open_desk
from fedpool.deployments.signals import ended_by_signals
from fedpool.loopback import bypass_proxies
from fedpool.sites.config import CONFIG_VARIABLE, SiteConfig
from fedpool.sites.own_memory import hide_memory
from fedpool.sites.service import Pace, SiteService
from fedpool.tasks.reach import SITE_POOL

_SILENT_LOOKS = 30
"""The worker is unhealthy after this many missed looks for work, like Prefect's own."""


class SiteWorkerResult(BaseWorkerResult):
    """The outcome of a run; required by Prefect's worker."""


class SiteWorker(BaseWorker[BaseJobConfiguration, BaseVariables, SiteWorkerResult]):
    """Runs a site's rounds in this process, and keeps each job's session warm between them.

    Args:
        work_pool_name: the pool to poll; it belongs to one site.
        work_queues: queues of the pool to look at; default: all.
        name: name of the worker, the same after a restart; default: the site's name.
        create_pool_if_not_found: whether to create the pool.
        limit: the most runs to have in hand at once.
        heartbeat_interval_seconds: interval between heartbeats.
        base_job_template: template for creating the pool.
        config: the site's settings; default: from the environment, with the pool's name as the
            site's name.
    """

    type = SITE_POOL
    _description = "Runs only the rounds of one federated learning site."
    _logo_url = ""
    _documentation_url = ""

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """The work pool's template: empty, so the server has nothing to check for a run."""
        return {}

    def __init__(
        self,
        work_pool_name: str,
        work_queues: list[str] | None = None,
        name: str | None = None,
        *,
        create_pool_if_not_found: bool = True,
        limit: int | None = None,
        base_job_template: dict[str, Any] | None = None,
        config: SiteConfig | None = None,
        **kwargs: Any,
    ) -> None:
        bypass_proxies()  # before a client is created
        if config is None:
            file = os.environ.get(CONFIG_VARIABLE)
            given = {} if file or "FEDPOOL_SITE_NAME" in os.environ else {"name": work_pool_name}
            config = SiteConfig.load(Path(file) if file else None, pool=work_pool_name, **given)
        config.check_devices()
        config.sandbox.check()
        config.open_store()  # a store that cannot be opened is named now, not in the first round
        super().__init__(work_pool_name, name=name or config.name, **kwargs)
        self.site = config
        self._counter = Counter(
            config.name,
            self.name,
            work_pool_name,
            self.heartbeat_interval_seconds,
            queues=tuple(work_queues or ()),
            template=(base_job_template or {}) if create_pool_if_not_found else None,
        )
        self._most = limit
        self._service: SiteService | None = None

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Serve the site. SIGTERM and SIGINT end it in order; a second signal ends it at once.

        Args:
            run_once: do only the work that is there now.
            with_healthcheck: ignored; Prefect's command serves its own healthcheck.
            printer: called when the worker has started, and when it has stopped.

        Raises:
            ConfigError: another process serves the site.
            ServerError: the server refuses.
        """
        if not PREFECT_API_URL.value():
            raise ValueError("PREFECT_API_URL must be set to start a worker")
        hide_memory()
        logger = get_logger("fedpool.site")
        for warning in self.site.sandbox.warnings():
            logger.warning("%s", warning)
        pace = Pace(PREFECT_WORKER_QUERY_SECONDS.value(), self.heartbeat_interval_seconds)
        with ended_by_signals():
            async with (
                open_desk(self._counter) as desk,
                SiteService(self.site, desk, pace=pace, limit=self._most, logger=logger) as self._service,
            ):
                printer(f"Worker {self.name!r} started!")
                await self._service.run(once=run_once)
        logger.info("site %s has stopped", self.site.name)
        printer(f"Worker {self.name!r} stopped!")

    async def run(self, flow_run: FlowRun, configuration: BaseJobConfiguration, task_status: Any = None) -> Any:
        """Never called: the service takes its work itself."""
        raise NotImplementedError(f"a {self.type} worker runs only work that it takes itself")

    def is_worker_still_polling(self, query_interval_seconds: float) -> bool:
        """See `BaseWorker.is_worker_still_polling`; Prefect's healthcheck calls it."""
        return self._service is None or self._service.silent_s <= _SILENT_LOOKS * query_interval_seconds
