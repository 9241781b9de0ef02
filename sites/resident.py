"""A site of a proof of concept or of production: the jobs that it takes part in, and their warm sessions.

A job's session is started by its first assignment and kept until the job ends (its `result.json` is there), is cancelled, or has
asked for nothing for the idle time. The work of one job is done one assignment at a time, in the order of its rounds.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from fedpool.bundle import unpack_bundle
from fedpool.errors import IntegrityError, SiteError, StoreError
from fedpool.manifest import ClientJob, SiteAssignment
from fedpool.sites.config import SiteConfig
from fedpool.sites.process import ProcessLauncher
from fedpool.sites.session import LogLine, Session, Work
from fedpool.sites.site_round import SiteFolder, run_site_round
from fedpool.store import JobPaths, Store

_LOCAL_POLL_S = 0.05
_REMOTE_POLL_S = 0.25
_JOB_POLL_S = 1.0
"""How often a site looks whether a job has ended, while it waits or trains."""


class Resident:
    """What lives at a site between rounds. Thread-safe; used as a context manager, whose end kills the scripts.

    Args:
        config: of the site.
    """

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self._jobs: dict[str, _JobHere] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        folder = config.folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=".fedpool-", dir=folder))

    def __enter__(self) -> "Resident":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the site was stopped."""
        return self._closed.is_set()

    def perform(self, job_id: str, round: int, *, store: str, stop: threading.Event, log: LogLine) -> bool:
        """Wait for the assignment of a round, do it, and commit what came of it to the store. Blocks; belongs on a thread.

        Args:
            store: fsspec URL that the coordinator works with; the site's own setting beats it.
            stop: set it to have the wait or the script end at once.
            log: called with each line that the script prints.

        Returns: whether the round came; False when the job ended before it did.

        Raises:
            SiteError: the script failed, missed its time, or was stopped; or job and store do not fit this site.
        """
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None:
                job = self._jobs[job_id] = _JobHere(job_id, self._open(store), self.config, self._scratch)
        try:
            return job.perform(round, stop=_Either(stop, self._closed), log=log)
        finally:
            if job.has_ended():
                self._forget(job)
            self.forget_idle()

    def forget_idle(self) -> None:
        """End what has asked for nothing in the idle time."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            if job.idle_s() > self.config.idle_timeout_s or (job.idle_s() > _JOB_POLL_S and job.has_ended()):
                self._forget(job)

    def close(self) -> None:
        """Kill all scripts and remove what was fetched. Idempotent."""
        self._closed.set()
        with self._lock:
            jobs = list(self._jobs.values())
            self._jobs.clear()
        for job in jobs:
            job.kill()
            job.end()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _open(self, store: str) -> Store:
        return Store(self.config.store or store, **self.config.storage_options)

    def _forget(self, job: "_JobHere") -> None:
        with self._lock:
            self._jobs.pop(job.job_id, None)
        job.end()


class _Either:
    """Two events as one."""

    def __init__(self, first: threading.Event, second: threading.Event) -> None:
        self._events = (first, second)

    def is_set(self) -> bool:
        return any(event.is_set() for event in self._events)


class _JobHere:
    """One job at this site."""

    def __init__(self, job_id: str, store: Store, config: SiteConfig, scratch: Path) -> None:
        self.job_id = job_id
        self._store = store
        self._paths = JobPaths(job_id)
        self._config = config
        self._folder = scratch / job_id
        self._folder.mkdir(parents=True, exist_ok=True)
        # The path of a Unix socket is limited to about 100 bytes, and a site's folder may lie deep.
        self._sockets = Path(tempfile.mkdtemp(prefix="fedpool-"))
        self._working = threading.Lock()
        self._asked = time.monotonic()
        self._waiting = 0
        self._ended = False
        self._client: ClientJob | None = None
        self._session: Session | None = None

    def perform(self, round: int, *, stop: _Either, log: LogLine) -> bool:
        self._waiting += 1
        try:
            assignment = self._wait_for(round, stop)
            if assignment is None:
                return False
            with self._working:
                self._do(assignment, stop, log)
            return True
        except (OSError, StoreError) as error:
            raise SiteError(self._config.name, round, f"its part of the store failed: {error}") from error
        finally:
            self._waiting -= 1
            self._asked = time.monotonic()

    def idle_s(self) -> float:
        return 0.0 if self._waiting else time.monotonic() - self._asked

    def has_ended(self) -> bool:
        """Whether the job's result is in the store."""
        if not self._ended:
            try:
                self._ended = self._store.exists(self._paths.result)
            except (OSError, StoreError):  # the store is away: whatever it is, it is not known to have ended
                return False
        return self._ended

    def kill(self) -> None:
        if (session := self._session) is not None:
            session.kill()

    def end(self) -> None:
        """Tell the script, give it time, and leave nothing of it behind."""
        with self._working:
            if self._session is not None:
                self._session.end()
                self._session = None
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _wait_for(self, round: int, stop: _Either) -> SiteAssignment | None:
        """The assignment, as soon as the coordinator has written it; None when the job ends first."""
        path = self._paths.assignment(round, self._config.name)
        pause = threading.Event()
        began = looked = answered = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                if self._store.exists(path):
                    return SiteAssignment.model_validate_json(self._store.read_bytes(path))
                answered = now
            except (OSError, StoreError):  # the store is away: give it as long as a write would
                if now - answered > self._store.patience_s:
                    raise
            except ValidationError as error:
                raise IntegrityError(f"{self._store.full(path)} is no assignment: {error}") from None
            if now - looked >= _JOB_POLL_S:
                looked = now
                if self.has_ended():
                    return None
            if stop.is_set():
                raise SiteError(self._config.name, round, "it was cancelled before the round began")
            if now - began > self._config.max_wait_s:
                raise SiteError(
                    self._config.name,
                    round,
                    f"the round did not begin in {self._config.max_wait_s:g} s (max_wait_s): the coordinator is gone",
                )
            pause.wait(_LOCAL_POLL_S if self._store.is_local else _REMOTE_POLL_S)

    def _do(self, assignment: SiteAssignment, stop: _Either, log: LogLine) -> None:
        client = self._client = self._client or self._read_job()
        deadline = None if assignment.timeout_s is None else time.monotonic() + assignment.timeout_s
        session = self._session = self._session or self._new_session(client)
        with _Watch(lambda: stop.is_set() or self.has_ended(), session.kill) as watch:
            try:
                run_site_round(
                    client,
                    assignment,
                    session=session,
                    store=self._store,
                    folder=SiteFolder(self._folder),
                    deadline=deadline,
                    log=log,
                )
            except SiteError as error:
                if watch.fired:
                    raise SiteError(error.site, error.round, "it was cancelled") from error
                raise
            finally:
                if watch.fired:  # a session that was killed is killed for good
                    self._session = None
                    session.end(0)

    def _read_job(self) -> ClientJob:
        """The job as the store describes it, its bundle unpacked.

        Raises:
            IntegrityError: something there is not what it says.
        """
        try:
            client = ClientJob.model_validate(self._store.read_json(self._paths.job)["client"], strict=False)
        except (KeyError, ValueError) as error:
            raise IntegrityError(f"{self._store.full(self._paths.job)} does not describe a job: {error}") from None
        data = self._store.read_bytes(self._paths.bundle(client.bundle_sha256))
        unpack_bundle(data, self._folder / "bundle", sha256=client.bundle_sha256)
        return client

    def _new_session(self, client: ClientJob) -> Session:
        config = self._config
        work = Work(
            job_id=self.job_id,
            site=config.name,
            script=self._folder / "bundle" / client.entry,
            arguments=client.site_arguments.get(config.name, client.arguments),
            config={**client.site_config.get(config.name, {}), **config.config},
            environment={"CUDA_VISIBLE_DEVICES": config.gpus} if config.gpus is not None else {},
        )
        launcher = ProcessLauncher(config.command, threads=client.threads, imports=client.imports)
        return Session(work, launcher, folder=self._sockets, workdir=config.folder.absolute())


class _Watch:
    """Calls `act` once when `condition` comes to hold, looking now and then, for the length of a `with` block."""

    def __init__(self, condition: Callable[[], bool], act: Callable[[], None]) -> None:
        self.fired = False
        self._condition = condition
        self._act = act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fedpool-watch", daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_JOB_POLL_S):
            if self._condition():
                self.fired = True
                self._act()
                return
