"""Simulated sites: sessions in local slots. `num_slots` limits how many scripts train at once.

With `keep_alive` a site's script lives from its first round to the end of the job, whatever the
number of slots. Without it each round starts a new script per site, so thousands of sites need no
more memory than the slots do.
"""

import asyncio
import contextvars
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import ClassVar

from fedpool.bundle import MAX_ZIP_BYTES
from fedpool.errors import SiteError
from fedpool.filter_field import read_filters
from fedpool.filters import Filter
from fedpool.messages import ClientJob, SiteAssignment
from fedpool.paths import JobPaths
from fedpool.sites.local_sessions import LocalSessions
from fedpool.sites.output import LogLine
from fedpool.sites.session import Session
from fedpool.sites.site_log import SiteLogs
from fedpool.sites.site_round import Delivery, SiteFolder, run_site_round
from fedpool.sites.sites import SIMULATED, Traits
from fedpool.store import Store


class LocalSites:
    """The sites of a simulation, in this machine's slots.

    Args:
        names: names of the sites.
        num_slots: number of sites that train at once.
        threads: torch threads of each script.
        keep_alive: whether scripts stay between rounds.
        gpus: device numbers, assigned to the slots in turn as `CUDA_VISIBLE_DEVICES`.
        workspace: folder for the sites' folders, on the store's file system so that updates are
            moved instead of copied.
        workdir: working directory of every script.
        imports: modules to import once for all scripts; see `preload`.
        show: called from any thread with a site and a line that its script printed; None: lines go
            only to files and to Prefect.
        origin: folder of the script that the bundle was made from, if it still exists.
        commands: commands for scripts that are not forked, e.g. site -> "torchrun --nproc-per-node
            2".
    """

    traits: ClassVar[Traits] = SIMULATED

    # No __dict__: Prefect would walk an object with one when it stores a flow's parameters.
    __slots__ = (
        "_cancel",
        "_endings",
        "_executor",
        "_filters",
        "_job",
        "_keep_alive",
        "_logs",
        "_sessions",
        "_show",
        "_slots",
        "_store",
        "_under_way",
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
        self.num_slots = num_slots
        self._keep_alive = keep_alive
        self._cancel = threading.Event()
        self._endings: dict[str, str] = {}
        self._slots = _free_slots(num_slots)
        # A thread for every site, so that a late one does not hold up the others.
        self._executor = ThreadPoolExecutor(len(self.names), thread_name_prefix="fedpool-site")
        self._under_way: dict[str, Future[Delivery]] = {}
        self._sessions = LocalSessions(
            names,
            threads=threads,
            gpus=gpus,
            workspace=workspace,
            workdir=workdir,
            imports=imports,
            commands=commands,
            origin=origin,
        )
        self._show = show
        self._logs: SiteLogs | None = None
        self._filters: tuple[Filter, ...] = ()
        self._job: ClientJob | None = None
        self._store: Store | None = None

    def preload(self) -> None:
        """Begin to import what scripts need, in another process; returns at once. Call it once."""
        self._sessions.preload()

    @property
    def cancelled(self) -> bool:
        """See `Sites.cancelled`."""
        return self._cancel.is_set()

    @property
    def endings(self) -> Mapping[str, str]:
        """See `Sites.endings`."""
        return dict(self._endings)

    def cancel(self) -> None:
        """Kill every script at once; waiting `perform` calls raise `SiteError`. From any thread."""
        self._cancel.set()
        self._sessions.kill()

    def open(self, job: ClientJob, store: Store) -> None:
        """See `Sites.open`."""
        self._sessions.open(job, store.read_bytes(JobPaths(job.job_id).bundle(job.bundle_sha256), MAX_ZIP_BYTES))
        self._filters = read_filters(job.filters)
        self._job, self._store = job, store
        self._logs = SiteLogs(job.job_id, store, self._show)

    async def announce(self, site: str, round: int, attempt: int) -> bool:
        """See `Sites.announce`; a local site is always ready."""
        return True

    async def unreachable(self, sites: Collection[str]) -> Mapping[str, str]:
        """See `Sites.unreachable`; a local site is always reachable."""
        return {}

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        """See `Sites.perform`."""
        site = assignment.site
        if (earlier := self._under_way.get(site)) is not None:  # the site was late, and its work goes on
            await asyncio.gather(asyncio.shield(asyncio.wrap_future(earlier)), return_exceptions=True)
        # The loggers behind `log` find their Prefect run and settings in this context, even if the
        # script prints after the last round.
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
        """End all scripts in parallel, and their zygote; remove their folders. Idempotent."""
        grace_s = 0.0 if self.cancelled else 10.0
        for site, work in self._under_way.items():
            if not work.done() and (session := self._sessions.living.get(site)) is not None:
                session.kill()
        wait(self._under_way.values())
        ends = [
            # Output of the ending scripts is logged from these threads, and the loggers find their
            # Prefect settings in the context.
            self._executor.submit(contextvars.copy_context().run, self._end, site, session, grace_s)
            for site, session in self._sessions.living.items()
        ]
        for end in ends:
            end.result()
        self._executor.shutdown()
        self._sessions.close()

    def _perform(self, assignment: SiteAssignment, deadline: float | None, log: LogLine, part: "_Part") -> Delivery:
        assert self._logs is not None, "open() comes first"
        site = assignment.site
        if self.cancelled:
            raise SiteError(site, assignment.round, "the job was cancelled")
        slot = part.take_slot()
        if slot is None:
            raise SiteError(site, assignment.round, "the round closed before a slot was free")
        try:
            if deadline is not None and time.monotonic() >= deadline:
                raise SiteError(site, assignment.round, "no slot was free before the round's deadline (round_timeout)")
            session = self._sessions.session_of(site, slot)
            if self.cancelled:  # cancel() may have come just before this session was added
                raise SiteError(site, assignment.round, "the job was cancelled")
            delivery = self._run(assignment, session, deadline, log)
            if not self._keep_alive:
                self._end(site, session)
            return delivery
        except SiteError as error:
            if self.cancelled:
                raise SiteError(site, assignment.round, "the job was cancelled") from error
            cause = error.cause.splitlines()[0]  # the rest was printed before
            self._logs.of(site).write(assignment.round, f"failed: {cause}")
            raise
        finally:
            if not self._keep_alive:
                self._sessions.living.pop(site, None)
            part.give_up()

    def _run(self, assignment: SiteAssignment, session: Session, deadline: float | None, log: LogLine) -> Delivery:
        assert self._job is not None and self._store is not None and self._logs is not None
        site = assignment.site
        kept = Path(self._store.full(JobPaths(self._job.job_id).kept(site)))
        folder = self._sessions.folder_of(site)
        return run_site_round(
            self._job,
            assignment,
            session=session,
            store=self._store,
            folder=SiteFolder(folder, folder, kept),
            deadline=deadline,
            log=self._logs.writer(site, assignment.round, log),
            trusted=self._store.is_local,
            apart=False,
            filters=self._filters,
        )

    def _end(self, site: str, session: Session, grace_s: float = 10.0) -> None:
        how = session.end(grace_s)
        if how is not None and not self.cancelled:
            self._endings[site] = how


def _free_slots(num_slots: int) -> queue.SimpleQueue[int]:
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(num_slots):
        slots.put(slot)
    return slots


class _Part:
    """A site's part of a round, and the slot that it uses. Thread-safe."""

    def __init__(self, slots: queue.SimpleQueue[int]) -> None:
        self._slots = slots
        self._lock = threading.Lock()
        self._slot: int | None = None
        self._given_up = False

    def take_slot(self) -> int | None:
        """Wait for a slot; None if the part was given up meanwhile."""
        slot = self._slots.get()
        with self._lock:
            if not self._given_up:
                self._slot = slot
                return slot
        self._slots.put(slot)
        return None

    def give_up(self) -> None:
        """Free the slot, because the part is done or was given up. Idempotent."""
        with self._lock:
            self._given_up = True
            slot, self._slot = self._slot, None
        if slot is not None:
            self._slots.put(slot)


def default_slots(num_sites: int, gpus: Sequence[str]) -> int:
    """One slot per device, or per processor if there are no devices, but at most one per site."""
    return max(1, min(num_sites, len(gpus) or os.cpu_count() or 1))
