"""A site outside a simulation: the jobs that it takes part in, and their warm sessions.

A job's first assignment starts its session. The session stays until the job ends (its `result.json`
exists), is cancelled, or has had no assignment for the idle timeout. A job does one assignment at a
time, in the order of its rounds.
"""

import shutil
import threading
import time
from pathlib import Path

from fedpool.bundle import MAX_ZIP_BYTES, unpack_bundle
from fedpool.errors import ConfigError, IntegrityError, SiteError, StoreError
from fedpool.filters import Filter
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.paths import JobPaths
from fedpool.site_order import in_order
from fedpool.sites.config import SiteConfig
from fedpool.sites.looks import Either, Looks, NowAndThen, Watch
from fedpool.sites.output import LogLine
from fedpool.sites.scratch import Scratch
from fedpool.sites.script_process import ProcessLauncher
from fedpool.sites.script_session import ScriptSession
from fedpool.sites.session import Session, Work
from fedpool.sites.site_filters import load_filters
from fedpool.sites.site_round import SiteFolder, run_site_round
from fedpool.sites.sockets import make_socket_folder
from fedpool.sites.turns import Turns
from fedpool.store import Store

_IDLE_POLL_S = 3.0
"""How often to check whether a job without calls has ended: that happens after its last round."""

_CLOSE_GRACE_S = 15.0

_MAX_JOB_BYTES = 64 << 20
"""Limit on the description of a job."""


class Resident:
    """The part of a site that lives between rounds. Thread-safe. On exit it kills the scripts.

    Args:
        config: the site's settings.
    """

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self._jobs: dict[str, _JobHere] = {}
        self._lock = threading.Lock()
        self._turns = Turns(config.max_jobs)
        self._closed = threading.Event()
        self._scratch = Scratch(config.folder.absolute(), ".fedpool-")
        self._keeper = threading.Thread(target=self._keep_house, name="fedpool-resident", daemon=True)
        self._keeper.start()

    def __enter__(self) -> "Resident":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the site was stopped."""
        return self._closed.is_set()

    def perform(self, job_id: str, round: int, attempt: int = 0, *, stop: threading.Event, log: LogLine) -> bool:
        """Wait for a round's assignment, do it, and commit the outcome to the store.

        Blocks, so call it on a thread.

        Args:
            stop: set it to end the wait or the script at once.
            log: called with each line that the script prints.

        Returns: whether the assignment came; False if the job ended first, or went on without this
        site.

        Raises:
            SiteError: the script failed, was stopped or missed its deadline, or the job or the
                store does not fit this site.
        """
        with self._lock:
            if self.closed:
                raise SiteError(self.config.name, round, "the site was stopped")
            job = self._jobs.get(job_id)
            if job is None:
                job = self._jobs[job_id] = _JobHere(
                    job_id, self.config.open_store(), self.config, self._scratch.path, self._turns
                )
            job.num_calls += 1
        try:
            return job.perform(round, attempt, stop=Either(stop, self._closed), log=log)
        finally:
            with self._lock:
                job.num_calls -= 1
                job.last_call = time.monotonic()

    def close(self) -> None:
        """Kill all scripts and remove all downloads. Idempotent."""
        with self._lock:
            self._closed.set()
            jobs = list(self._jobs.values())
            self._jobs.clear()
        for job in jobs:
            job.kill()
        for job in jobs:
            job.end()
        self._keeper.join(_CLOSE_GRACE_S)  # it may be ending a script, or waiting for the store
        self._scratch.remove()

    def _keep_house(self) -> None:
        """End the scripts of jobs that have ended or had no assignment for the idle timeout."""
        while not self._closed.wait(min(_IDLE_POLL_S, self.config.idle_timeout_s)):
            with self._lock:
                quiet = [job for job in self._jobs.values() if job.num_calls == 0]
            for job in quiet:
                over = time.monotonic() - job.last_call > self.config.idle_timeout_s or job.has_ended()
                with self._lock:
                    if not over or job.num_calls or self._jobs.get(job.job_id) is not job:
                        continue  # it has a call again
                    del self._jobs[job.job_id]
                job.end()


class _JobHere:
    """One job at this site."""

    def __init__(self, job_id: str, store: Store, config: SiteConfig, scratch: Path, turns: Turns) -> None:
        self.job_id = job_id
        self._store = store
        self._paths = JobPaths(job_id)
        self._looks = Looks(config.name, store, self._paths, max_wait_s=config.max_wait_s)
        self._config = config
        self._turns = turns
        self._folder = scratch / job_id
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sockets = make_socket_folder()
        self._working = threading.Lock()
        self.num_calls = 0
        """Calls of `perform` in progress. Guarded by the resident's lock, like the next one."""
        self.last_call = time.monotonic()
        self._client: ClientJob | None = None
        self._filters: tuple[Filter, ...] = ()
        self._sites: list[str] = []
        self._last: tuple[SiteAssignment, LogLine] | None = None
        self._session: Session | None = None

    def perform(self, round: int, attempt: int, *, stop: Either, log: LogLine) -> bool:
        try:
            assignment = self._looks.wait_for(round, attempt, stop)
            if assignment is None:
                return False
            deadline = None if assignment.timeout_s is None else time.monotonic() + assignment.timeout_s
            with self._working:
                if self._looks.is_over(round):  # it ended while the script worked on the previous round
                    return False
                is_over = NowAndThen(lambda: self._looks.is_over(round))

                def give_up() -> bool:
                    late = deadline is not None and time.monotonic() >= deadline
                    return late or stop.is_set() or is_over()

                with self._turns.turn(self.job_id, over=give_up, tell=log) as came:
                    if came:
                        self._do(assignment, deadline, stop, log)
                    elif stop.is_set():
                        raise SiteError(self._config.name, round, "the run was cancelled before its turn")
            return came
        except (OSError, StoreError) as error:
            raise SiteError(self._config.name, round, f"the store failed: {error}") from error

    def has_ended(self) -> bool:
        """Whether the job's result is in the store."""
        return self._looks.has_ended()

    def kill(self) -> None:
        if (session := self._session) is not None:
            session.kill()

    def end(self) -> None:
        """Tell the script to end, give it time, and remove everything that it leaves."""
        with self._working:
            if self._session is not None:
                how = self._session.end()
                self._session = None
                if how is not None:
                    self._tell_ending(how)
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _tell_ending(self, how: str) -> None:
        """Report how the script failed after its last round, in its log and in the job."""
        assert self._last is not None, "a script is started by an assignment"
        assignment, log = self._last
        log(f"after its last round, {how}")
        path = self._paths.ending(assignment.round, assignment.site, assignment.attempt)
        try:
            if self.has_ended():  # otherwise it was idle, and may be started again
                self._store.write_json(path, {"how": how})
        except (OSError, StoreError) as error:
            log(f"{path} could not be written: {error}")

    def _do(self, assignment: SiteAssignment, deadline: float | None, stop: Either, log: LogLine) -> None:
        client = self._client = self._client or self._read_job(assignment.round)
        self._last = assignment, log
        session = self._session = self._session or self._new_session(client)
        with Watch(lambda: stop.is_set() or self.has_ended(), session.kill) as watch:
            try:
                run_site_round(
                    client,
                    assignment,
                    session=session,
                    store=self._store,
                    folder=SiteFolder(self._folder, self._config.folder.absolute() / "kept" / self.job_id),
                    deadline=deadline,
                    log=log,
                    filters=self._filters,
                )
            except SiteError as error:
                if watch.fired:
                    raise SiteError(error.site, error.round, "the run was cancelled") from error
                raise
            finally:
                if watch.fired:  # a killed session cannot be used again
                    self._session = None
                    session.end(0)

    def _read_job(self, round: int) -> ClientJob:
        """Read the job's description from the store, and unpack its bundle.

        Raises:
            IntegrityError: an object is invalid or does not match its hash.
            SiteError: this site does not allow the code of the job's filters.
        """
        try:
            described = self._store.read_json(self._paths.job, _MAX_JOB_BYTES)
            client = ClientJob.model_validate(described["client"], strict=False)
            if client.job_id != self.job_id:  # its objects would be those of another job
                raise ValueError(f"it names the job {client.job_id!r}")
            self._sites = in_order(described["sites"])
            self._sites.index(self._config.name)
        except (KeyError, ValueError) as error:
            raise IntegrityError(f"{self._store.full(self._paths.job)} does not describe a job: {error}") from None
        data = self._store.read_bytes(self._paths.bundle(client.bundle_sha256), MAX_ZIP_BYTES)
        unpack_bundle(data, self._folder / "bundle", sha256=client.bundle_sha256)
        try:
            self._filters = load_filters(client, self._store, self._config.allow_code)
        except ConfigError as error:
            raise SiteError(self._config.name, round, str(error)) from error
        return client

    def _new_session(self, client: ClientJob) -> Session:
        config = self._config
        work = Work(
            job_id=self.job_id,
            site=config.name,
            script=self._folder / "bundle" / client.entry,
            arguments=client.site_arguments.get(config.name, client.arguments),
            config={**client.config, **client.site_config.get(config.name, {}), **config.config},
            environment={"CUDA_VISIBLE_DEVICES": config.gpus} if config.gpus is not None else {},
            site_index=self._sites.index(config.name),
            num_sites=len(self._sites),
        )
        launcher = ProcessLauncher(config.command, threads=client.threads, imports=client.imports)
        return ScriptSession(work, launcher, folder=self._sockets, workdir=config.folder.absolute())
