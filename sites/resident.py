"""A site of a proof of concept or of production: the jobs that it takes part in, and their warm
sessions.

A job's session is started by its first assignment and kept until the job ends (its `result.json` is
there), is cancelled, or has asked for nothing for the idle time. The work of one job is done one
assignment at a time, in the order of its rounds.
"""

import shutil
import threading
import time
from pathlib import Path

from fedpool.bundle import unpack_bundle
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
"""How often it looks otherwise: a job ends some time after its last round."""

_CLOSE_GRACE_S = 15.0


class Resident:
    """What lives at a site between rounds. Thread-safe; used as a context manager, whose end kills
    the scripts.

    Args:
        config: of the site.
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

    def perform(
        self, job_id: str, round: int, attempt: int = 0, *, store: str, stop: threading.Event, log: LogLine
    ) -> bool:
        """Wait for the assignment of a round, do it, and commit what came of it to the store.
        Blocks; belongs on a thread.

        Args:
            store: fsspec URL that the coordinator works with; the site's own setting beats it.
            stop: set it to have the wait or the script end at once.
            log: called with each line that the script prints.

        Returns: whether the round came; False when the job ended before it did, or went on without
        this site.

        Raises:
            SiteError: the script failed, missed its time, or was stopped; or job and store do not
                fit this site.
        """
        with self._lock:
            if self.closed:
                raise SiteError(self.config.name, round, "the site was stopped")
            job = self._jobs.get(job_id)
            if job is None:
                job = self._jobs[job_id] = _JobHere(
                    job_id, self._open(store), self.config, self._scratch.path, self._turns
                )
            job.num_calls += 1
        try:
            return job.perform(round, attempt, stop=Either(stop, self._closed), log=log)
        finally:
            with self._lock:
                job.num_calls -= 1
                job.last_call = time.monotonic()

    def close(self) -> None:
        """Kill all scripts and remove what was fetched. Idempotent."""
        with self._lock:
            self._closed.set()
            jobs = list(self._jobs.values())
            self._jobs.clear()
        for job in jobs:
            job.kill()
        for job in jobs:
            job.end()
        self._keeper.join(_CLOSE_GRACE_S)  # it may be ending a script, or wait for a store that does not answer
        self._scratch.remove()

    def _open(self, store: str) -> Store:
        return Store(self.config.store or store, **self.config.storage_options)

    def _keep_house(self) -> None:
        """End the scripts of jobs that have ended, or that have asked for nothing in the idle
        time.
        """
        while not self._closed.wait(min(_IDLE_POLL_S, self.config.idle_timeout_s)):
            with self._lock:
                quiet = [job for job in self._jobs.values() if job.num_calls == 0]
            for job in quiet:
                over = time.monotonic() - job.last_call > self.config.idle_timeout_s or job.has_ended()
                with self._lock:
                    if not over or job.num_calls or self._jobs.get(job.job_id) is not job:
                        continue  # it has come back meanwhile
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
        """Calls of `perform` that are under way; belongs to the resident, and to its lock, as
        does the next.
        """
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
                if self._looks.is_over(round):  # while the script was still at work for the round before
                    return False
                is_over = NowAndThen(lambda: self._looks.is_over(round))

                def give_up() -> bool:
                    late = deadline is not None and time.monotonic() >= deadline
                    return late or stop.is_set() or is_over()

                with self._turns.turn(self.job_id, over=give_up, tell=log) as came:
                    if came:
                        self._do(assignment, deadline, stop, log)
                    elif stop.is_set():
                        raise SiteError(self._config.name, round, "it was cancelled before its turn")
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
        """Tell the script, give it time, and leave nothing of it behind."""
        with self._working:
            if self._session is not None:
                how = self._session.end()
                self._session = None
                if how is not None:
                    self._tell_ending(how)
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _tell_ending(self, how: str) -> None:
        """Say how the script failed after its last round: in its log, and to those who look at
        the job.
        """
        assert self._last is not None, "a script is started by an assignment"
        assignment, log = self._last
        log(f"after its last round, {how}")
        path = self._paths.ending(assignment.round, assignment.site, assignment.attempt)
        try:
            if self.has_ended():  # else it was idle, and may be started again
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
                    raise SiteError(error.site, error.round, "it was cancelled") from error
                raise
            finally:
                if watch.fired:  # a session that was killed is killed for good
                    self._session = None
                    session.end(0)

    def _read_job(self, round: int) -> ClientJob:
        """The job as the store describes it, its bundle unpacked.

        Raises:
            IntegrityError: something there is not what it says.
            SiteError: this site does not allow the code of the job's filters.
        """
        try:
            described = self._store.read_json(self._paths.job)
            client = ClientJob.model_validate(described["client"], strict=False)
            self._sites = in_order(described["sites"])
            self._sites.index(self._config.name)
        except (KeyError, ValueError) as error:
            raise IntegrityError(f"{self._store.full(self._paths.job)} does not describe a job: {error}") from None
        data = self._store.read_bytes(self._paths.bundle(client.bundle_sha256))
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
