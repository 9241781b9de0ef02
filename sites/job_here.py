"""One job at a real site: its folders, its session, and its assignments in turn."""

import os
import shutil
import site
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fedpool.bundle import MAX_ZIP_BYTES, check_entry, unpack_bundle
from fedpool.errors import ConfigError, IntegrityError, SiteError, StoreError
from fedpool.filters import Filter
from fedpool.job_digest import job_digest
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.paths import JobPaths
from fedpool.site_order import in_order
from fedpool.sites.config import SiteConfig
from fedpool.sites.job_folders import JobFolders, job_key
from fedpool.sites.looks import Either, Looks, NowAndThen, Watch
from fedpool.sites.output import LogLine
from fedpool.sites.script_environment import for_scripts
from fedpool.sites.script_process import ProcessLauncher
from fedpool.sites.script_session import ScriptSession
from fedpool.sites.session import Session, Work
from fedpool.sites.site_filters import load_filters
from fedpool.sites.site_round import SiteFolder, run_site_round
from fedpool.sites.sockets import make_socket_folder
from fedpool.sites.turns import Turns
from fedpool.store import Store

_MAX_JOB_BYTES = 64 << 20
"""Limit on the description of a job."""


class JobHere:
    """One job at this site. `perform`, `kill` and `has_ended` may be called from any thread.

    Args:
        scratch: folder for what is removed when the session ends.
    """

    def __init__(self, job_id: str, store: Store, config: SiteConfig, scratch: Path, turns: Turns) -> None:
        self.job_id = job_id
        self.num_calls = 0
        """Calls of `perform` in progress. Guarded by the resident's lock, like the next one."""
        self.last_call = time.monotonic()
        self._store = store
        self._paths = JobPaths(job_id)
        self._looks = Looks(config.name, store, self._paths, max_wait_s=config.max_wait_s)
        self._config = config
        self._turns = turns
        self._scratch = scratch
        self._sockets = make_socket_folder()
        self._working = threading.Lock()
        self._known: _Known | None = None
        self._last: tuple[SiteAssignment, LogLine] | None = None
        self._session: Session | None = None

    def perform(self, round: int, attempt: int, *, stop: Either, log: LogLine) -> bool:
        """See `Resident.perform`."""
        try:
            assignment = self._looks.wait_for(round, attempt, stop)
            if assignment is None:
                return False
            limits = [each for each in (assignment.timeout_s, self._config.sandbox.max_round_s) if each is not None]
            deadline = time.monotonic() + min(limits) if limits else None
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
        """Kill the script, if it runs."""
        if (session := self._session) is not None:
            session.kill()

    def end(self) -> None:
        """Tell the script to end, give it time, and remove everything that doesn't stay."""
        with self._working:
            if self._session is not None:
                how = self._session.end()
                self._session = None
                if how is not None:
                    self._tell_ending(how)
            if self._known is not None:
                self._known.folders.remove()
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
        known = self._known = self._known or self._read_job(assignment.round, log)
        self._last = assignment, log
        session = self._session = self._session or self._new_session(known, assignment.round)
        folders = known.folders
        with Watch(lambda: stop.is_set() or self.has_ended(), session.kill) as watch:
            try:
                run_site_round(
                    known.client,
                    assignment,
                    session=session,
                    store=self._store,
                    folder=SiteFolder(folders.models, folders.outbox, folders.kept, self._config.sandbox.is_apart),
                    deadline=deadline,
                    log=log,
                    filters=known.filters,
                )
            except SiteError as error:
                if watch.fired:
                    raise SiteError(error.site, error.round, "the run was cancelled") from error
                if hint := self._config.sandbox.hint(error.cause):
                    log(hint)
                raise
            finally:
                if watch.fired:  # a killed session cannot be used again
                    self._session = None
                    session.end(0)

    def _read_job(self, round: int, log: LogLine) -> "_Known":
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
            sites = in_order(described["sites"])
            sites.index(self._config.name)
        except (KeyError, ValueError) as error:
            raise IntegrityError(f"{self._store.full(self._paths.job)} does not describe a job: {error}") from None
        digest = job_digest(client)
        log(f"job {self.job_id} runs {client.entry}, digest {digest}")
        data = self._store.read_bytes(self._paths.bundle(client.bundle_sha256), MAX_ZIP_BYTES)
        folders = JobFolders.make(
            job_key(self._store.url, self.job_id, digest), scratch=self._scratch, site=self._config.folder.absolute()
        )
        unpack_bundle(data, folders.bundle, sha256=client.bundle_sha256)
        check_entry(client.entry, folders.bundle)
        try:
            filters = load_filters(client, self._store, self._config.allow_code)
        except ConfigError as error:
            raise SiteError(self._config.name, round, str(error)) from error
        return _Known(client, tuple(sites), folders, filters)

    def _new_session(self, known: "_Known", round: int) -> Session:
        config, client, folders = self._config, known.client, known.folders
        sandbox = config.sandbox
        try:
            sandbox.give(folders, self._sockets)
        except OSError as error:
            cause = f"the job's folders cannot be given to the user {sandbox.user}: {error}"
            raise SiteError(config.name, round, cause) from error
        environment = {"HOME": str(folders.work)}
        if config.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = config.gpus
        work = Work(
            job_id=self.job_id,
            site=config.name,
            script=folders.bundle / client.entry,
            arguments=client.site_arguments.get(config.name, client.arguments),
            config={**client.config, **client.site_config.get(config.name, {}), **config.config},
            environment=environment,
            site_index=known.sites.index(config.name),
            num_sites=len(known.sites),
        )
        launcher = ProcessLauncher(
            config.command,
            threads=client.threads,
            imports=client.imports,
            environment=_user_packages() | for_scripts(os.environ, config.script_environment),
            sandbox=sandbox.command(folders, self._sockets),
            limits=sandbox.limits,
            user=sandbox.user,
        )
        return ScriptSession(work, launcher, folder=self._sockets, workdir=folders.work)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a site knows about a job once it has read its description."""

    client: ClientJob
    sites: tuple[str, ...]
    folders: JobFolders
    filters: tuple[Filter, ...]


def _user_packages() -> dict[str, str]:
    """Where Python finds packages of this user, which it derives from `HOME`."""
    return {"PYTHONUSERBASE": site.getuserbase()} if site.ENABLE_USER_SITE else {}
