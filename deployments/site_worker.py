"""The `fedpool-site` worker: what Prefect's command, and ours, start to serve a site inside their
own process.

What it is handed comes from outside the site: of a run it takes the five parameters of
`site_round`, and checks them. Entrypoint, pull steps, command, environment and job variables of the
run's deployment are never looked at. A run of any other flow is refused. Of Prefect's worker it has
the name and the settings: what it does is `SiteService`, at a `PrefectDesk`.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.logging import get_logger
from prefect.settings import PREFECT_API_URL, PREFECT_WORKER_QUERY_SECONDS
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from fedpool.deployments.prefect_desk import Counter, open_desk
from fedpool.loopback import bypass_proxies
from fedpool.sites.config import CONFIG_VARIABLE, SiteConfig
from fedpool.sites.service import Pace, SiteService
from fedpool.tasks.reach import SITE_POOL

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SILENT_LOOKS = 30
"""After so many looks for work that did not come the worker is not well, as with Prefect's own."""


class SiteWorkerResult(BaseWorkerResult):
    """How a run ended, as Prefect's worker wants to know it."""


class SiteWorker(BaseWorker[BaseJobConfiguration, BaseVariables, SiteWorkerResult]):
    """Runs a site's rounds in this process, and keeps each job's session warm between them.

    Args:
        work_pool_name: the pool to poll; it belongs to one site.
        work_queues: of the pool, those to look at; default: all.
        name: of the worker; default: the site's. It must last over restarts.
        create_pool_if_not_found: whether to make the pool.
        limit: how many runs it has in hand at once.
        heartbeat_interval_seconds: how often it gives a sign of life.
        base_job_template: of the pool, where it is made.
        config: of the site; default: from the environment, the pool's name for its name.
    """

    type = SITE_POOL
    _description = "Runs the rounds of one federated learning site, and nothing else."
    _logo_url = ""
    _documentation_url = ""

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """The work pool's template: there is nothing to set, and nothing that the server has to
        check with every run.
        """
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
        bypass_proxies()  # before there is a client
        if config is None:
            file = os.environ.get(CONFIG_VARIABLE)
            given = {} if file or "FEDPOOL_SITE_NAME" in os.environ else {"name": work_pool_name}
            config = SiteConfig.load(Path(file) if file else None, pool=work_pool_name, **given)
        config.check_devices()
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
        """Serve the site. SIGTERM and SIGINT end it in order; a second one ends it at once.

        Args:
            run_once: do what there is to do now, and end.
            with_healthcheck: without effect; Prefect's command serves its own.
            printer: told that the worker has started, and stopped.

        Raises:
            ConfigError: another process serves the site.
            ServerError: the server refuses.
        """
        if not PREFECT_API_URL.value():
            raise ValueError("PREFECT_API_URL must be set to start a worker")
        logger = get_logger("fedpool.site")
        pace = Pace(PREFECT_WORKER_QUERY_SECONDS.value(), self.heartbeat_interval_seconds)
        with _ended_by_signals() as signalled:
            try:
                async with (
                    open_desk(self._counter) as desk,
                    SiteService(self.site, desk, pace=pace, limit=self._most, logger=logger) as self._service,
                ):
                    printer(f"Worker {self.name!r} started!")
                    await self._service.run(once=run_once)
            except asyncio.CancelledError:
                if not signalled.is_set():
                    raise
                _go_on()
                logger.info("site %s has stopped", self.site.name)
        printer(f"Worker {self.name!r} stopped!")

    async def run(self, flow_run: FlowRun, configuration: BaseJobConfiguration, task_status: Any = None) -> Any:
        """Never called: the service takes its work itself."""
        raise NotImplementedError(f"a {self.type} worker runs nothing but what it takes itself")

    def is_worker_still_polling(self, query_interval_seconds: float) -> bool:
        """See `BaseWorker.is_worker_still_polling`: what Prefect's healthcheck asks."""
        return self._service is None or self._service.silent_s <= _SILENT_LOOKS * query_interval_seconds


@contextmanager
def _ended_by_signals() -> Iterator[threading.Event]:
    """Have signals cancel the current task, and set the event; only where signals come, in the main
    thread.

    Prefect makes them a KeyboardInterrupt wherever the main thread happens to be, and some of what
    it calls there takes that for an error of its own and goes on.
    """
    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield signalled
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop() -> None:
        signalled.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield signalled
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _go_on() -> None:
    """Take a cancellation as dealt with."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
