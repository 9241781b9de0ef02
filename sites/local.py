"""Simulated sites: sessions in local slots. `num_slots` bounds how many scripts train at once.

With `keep_alive` a site's script lives from its first round to the job's end, whatever the number
of slots; without it each round starts a fresh script per site, so that thousands of sites need no
more memory than the slots do.
"""

import asyncio
import contextvars
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import ClassVar

from fedpool.bundle import unpack_bundle
from fedpool.errors import SiteError
from fedpool.filter_field import read_filters
from fedpool.filters import Filter
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.paths import JobPaths
from fedpool.refusals import explained
from fedpool.site_order import in_order
from fedpool.sites.output import LogLine
from fedpool.sites.scratch import Scratch
from fedpool.sites.script_process import ProcessLauncher
from fedpool.sites.script_session import ScriptSession
from fedpool.sites.session import Session, Work
from fedpool.sites.site_log import SiteLog
from fedpool.sites.site_round import Delivery, SiteFolder, run_site_round
from fedpool.sites.sites import SIMULATED, Traits
from fedpool.sites.sockets import make_socket_folder
from fedpool.sites.zygote import Zygote
from fedpool.store import Store


class LocalSites:
    """Sites of a simulation, in this machine's slots.

    Args:
        names: of the sites.
        num_slots: how many train at once.
        threads: torch threads of each script.
        keep_alive: whether scripts live over all rounds.
        gpus: device numbers dealt to the slots in turn, as `CUDA_VISIBLE_DEVICES`.
        workspace: where the sites' folders lie, on the file system of the store so that updates
            move and are not copied.
        workdir: the current folder of every script.
        imports: what to import once for all scripts; see `preload`.
        show: called with a site and a line that its script printed, from any thread; None: only
            files and Prefect have it.
        origin: folder of the script that the bundle was made of, where it is still there.
        commands: what runs the scripts of the sites that are not forked, e.g. site -> "torchrun
            --nproc-per-node 2".
    """

    traits: ClassVar[Traits] = SIMULATED

    # No __dict__: Prefect would walk an object with one when it stores a flow's parameters.
    __slots__ = (
        "_cancel",
        "_commands",
        "_endings",
        "_executor",
        "_filters",
        "_folder",
        "_gpus",
        "_imports",
        "_index",
        "_job",
        "_keep_alive",
        "_launchers",
        "_logs",
        "_origin",
        "_scratch",
        "_sessions",
        "_show",
        "_slots",
        "_sockets",
        "_store",
        "_under_way",
        "_workdir",
        "_zygote",
        "names",
        "num_slots",
    )

    def __init__(
        self,
        names: Sequence[str],
        *,
        num_slots: int,
        threads: int,
        keep_alive: bool,
        gpus: Sequence[str],
        workspace: Path,
        workdir: Path,
        imports: Sequence[str],
        commands: Mapping[str, str],
        show: Callable[[str, str], None] | None = None,
        origin: str = "",
    ) -> None:
        self.names = tuple(names)
        self._index = {name: index for index, name in enumerate(in_order(names))}
        self.num_slots = num_slots
        self._keep_alive = keep_alive
        self._gpus = tuple(gpus)
        self._workdir = workdir
        self._cancel = threading.Event()
        self._endings: dict[str, str] = {}
        self._sessions: dict[str, Session] = {}
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(num_slots):
            self._slots.put(slot)
        # A thread for every site that is asked: those that nobody waits for any more do not hold up
        # the others.
        self._executor = ThreadPoolExecutor(len(self.names), thread_name_prefix="fedpool-site")
        self._under_way: dict[str, Future[Delivery]] = {}
        self._sockets = make_socket_folder()
        self._scratch = Scratch(workspace, ".fedpool-sites-")
        self._folder = self._scratch.path
        self._imports = tuple(imports)
        self._origin = origin
        self._show = show
        self._logs: dict[str, SiteLog] = {}
        self._commands = dict(commands)
        self._launchers = {
            command: ProcessLauncher(command, threads=threads, imports=imports) for command in set(commands.values())
        }
        self._zygote = None if commands.keys() >= set(names) else Zygote(threads=threads)
        self._filters: tuple[Filter, ...] = ()
        self._job: ClientJob | None = None
        self._store: Store | None = None

    def preload(self) -> None:
        """Begin to import, in another process, what the scripts need; returns at once. To be
        called once.
        """
        if self._zygote is not None:
            self._zygote.preload(self._imports)

    @property
    def cancelled(self) -> bool:
        """See `Sites.cancelled`."""
        return self._cancel.is_set()

    @property
    def endings(self) -> Mapping[str, str]:
        """See `Sites.endings`."""
        return dict(self._endings)

    def cancel(self) -> None:
        """Kill every script at once; whoever waits for one gets a `SiteError`. From any thread."""
        self._cancel.set()
        for session in list(self._sessions.values()):
            session.kill()

    def open(self, job: ClientJob, store: Store) -> None:
        """See `Sites.open`."""
        with store.open(JobPaths(job.job_id).bundle(job.bundle_sha256)) as file:
            data = file.read()
        unpack_bundle(data, self._folder / "bundle", sha256=job.bundle_sha256)
        self._filters = read_filters(job.filters)
        self._job, self._store = job, store

    async def announce(self, site: str, round: int, attempt: int) -> bool:
        """See `Sites.announce`: a local site is always ready."""
        return True

    async def unreachable(self, sites: Collection[str]) -> Mapping[str, str]:
        """See `Sites.unreachable`: a local site is always there."""
        return {}

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        """See `Sites.perform`."""
        site = assignment.site
        if (earlier := self._under_way.get(site)) is not None:  # it was late, and nobody waits for it
            await asyncio.gather(asyncio.shield(asyncio.wrap_future(earlier)), return_exceptions=True)
        # The loggers behind `log` find their Prefect run and settings in it, also when the script
        # prints after the last round.
        context, of_log = contextvars.copy_context(), contextvars.copy_context()
        part = _Part(self._slots)
        work = self._under_way[site] = self._executor.submit(
            context.run, self._perform, assignment, deadline, lambda line: of_log.run(log, line), part
        )
        try:
            return await asyncio.shield(asyncio.wrap_future(work))
        except asyncio.CancelledError:
            part.give_up()
            raise
        finally:
            if work.done():
                del self._under_way[site]

    async def end(self) -> None:
        """See `Sites.end`."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End all scripts, in parallel, then the process that forked them; remove the sites'
        folders. Idempotent.
        """
        grace_s = 0.0 if self.cancelled else 10.0
        for site, work in self._under_way.items():
            if not work.done() and (session := self._sessions.get(site)) is not None:
                session.kill()
        wait(self._under_way.values())
        ends = [
            # What scripts still print is logged from these threads, and the loggers find their
            # Prefect settings in the context.
            self._executor.submit(contextvars.copy_context().run, self._end, site, session, grace_s)
            for site, session in self._sessions.items()
        ]
        for end in ends:
            end.result()
        self._executor.shutdown()
        self._sessions.clear()
        if self._zygote is not None:
            self._zygote.close()
        self._scratch.remove()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _perform(self, assignment: SiteAssignment, deadline: float | None, log: LogLine, part: "_Part") -> Delivery:
        assert self._job is not None and self._store is not None, "open() comes first"
        site = assignment.site
        if self.cancelled:
            raise SiteError(site, assignment.round, "the job was cancelled")
        slot = part.take_slot()
        if slot is None:
            raise SiteError(site, assignment.round, "the round closed before a slot was free")
        try:
            if deadline is not None and time.monotonic() >= deadline:
                raise SiteError(site, assignment.round, "no slot was free before the round's deadline (round_timeout)")
            session = self._sessions.get(site) or self._new_session(site, slot)
            if self.cancelled:  # cancel() may have looked at the sessions just before this one was added
                raise SiteError(site, assignment.round, "the job was cancelled")
            kept = Path(self._store.full(JobPaths(self._job.job_id).kept(site)))
            delivery = run_site_round(
                self._job,
                assignment,
                session=session,
                store=self._store,
                folder=SiteFolder(self._folder / "sites" / site, kept),
                deadline=deadline,
                log=self._logging(assignment, log),
                trusted=self._store.is_local,
                apart=False,
                filters=self._filters,
            )
            if not self._keep_alive:
                self._end(site, session)
            return delivery
        except SiteError as error:
            if self.cancelled:
                raise SiteError(site, assignment.round, "the job was cancelled") from error
            self._log_of(site).write(assignment.round, f"failed: {error.cause.splitlines()[0]}")  # the rest was printed
            raise
        finally:
            if not self._keep_alive:
                self._sessions.pop(site, None)
            part.give_up()

    def _end(self, site: str, session: Session, grace_s: float = 10.0) -> None:
        how = session.end(grace_s)
        if how is not None and not self.cancelled:
            self._endings[site] = how

    def _log_of(self, site: str) -> SiteLog:
        assert self._job is not None and self._store is not None
        path = Path(self._store.full(JobPaths(self._job.job_id).log(site)))
        return self._logs.setdefault(site, SiteLog(path))

    def _logging(self, assignment: SiteAssignment, log: LogLine) -> LogLine:
        """Pass on lines to the site's log file, to the terminal if it is to show them, and to
        `log`.
        """
        file = self._log_of(assignment.site)

        def write(line: str) -> None:
            problem = file.write(assignment.round, line)
            for each in (problem, line):
                if each is not None:
                    if self._show is not None:
                        self._show(assignment.site, each)
                    log(each)

        return write

    def _new_session(self, site: str, slot: int) -> Session:
        assert self._job is not None
        folder, sockets = self._folder / "sites" / site, self._sockets / str(self.names.index(site))
        for made in (folder, sockets):
            with explained(made):
                made.mkdir(parents=True, exist_ok=True)
        environment = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        work = Work(
            job_id=self._job.job_id,
            site=site,
            script=self._folder / "bundle" / self._job.entry,
            arguments=self._job.site_arguments.get(site, self._job.arguments),
            config={**self._job.config, **self._job.site_config.get(site, {})},
            environment=environment,
            site_index=self._index[site],
            num_sites=len(self.names),
            origin=self._origin,
        )
        launcher = self._launchers[self._commands[site]] if site in self._commands else self._zygote
        assert launcher is not None
        session = ScriptSession(work, launcher, folder=sockets, workdir=self._workdir)
        self._sessions[site] = session
        return session


class _Part:
    """A site's part of a round, and the slot in which it is done. Thread-safe."""

    def __init__(self, slots: queue.SimpleQueue[int]) -> None:
        self._slots = slots
        self._lock = threading.Lock()
        self._slot: int | None = None
        self._given_up = False

    def take_slot(self) -> int | None:
        """Wait for a slot; None when the part was given up meanwhile."""
        slot = self._slots.get()
        with self._lock:
            if not self._given_up:
                self._slot = slot
                return slot
        self._slots.put(slot)
        return None

    def give_up(self) -> None:
        """Let others have the slot: the part is done, or nobody waits for it any more.
        Idempotent.
        """
        with self._lock:
            self._given_up = True
            slot, self._slot = self._slot, None
        if slot is not None:
            self._slots.put(slot)


def default_slots(num_sites: int, gpus: Sequence[str]) -> int:
    """One slot per device, or per processor without devices, and no more than there are sites."""
    return max(1, min(num_sites, len(gpus) or os.cpu_count() or 1))
