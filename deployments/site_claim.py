"""Which process serves a site: a claim on the Prefect server, by which a second one is refused.

It is a Prefect variable, because creating one is atomic, and deleting one by its id touches no
later one of its name. A claim whose process is gone counts for nothing: on the same machine the
process itself is looked for, elsewhere its worker's heartbeats.
"""

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import psutil
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import VariableCreate
from prefect.client.schemas.objects import Worker, WorkerStatus
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from fedpool.errors import ConfigError
from fedpool.tasks.prefect_internals import delete_variable, delete_worker

_LOOK_S = 30.0
"""How often a process looks whether its claim still stands."""
_HEARTBEATS = 2
"""A worker that sends none in the time of so many is dead; should it wake up after all, it finds
that it was replaced.
"""
_HEARTBEAT_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that serves a site.

    Attributes:
        machine: tells apart machines, their boots, and the containers on them that do not see each
            other's processes.
        born: when it began, by the machine's own count; tells it from a later process of its pid.
        token: tells it from everyone else.
    """

    site: str
    worker: str
    pool: str
    host: str
    machine: str
    pid: int
    born: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class SiteClaim:
    """The claim of this process to serve a site.

    Args:
        site: its name.
        worker: name of this process's worker.
        pool: the worker's pool.
        tell: told what is waited for, if anything is.
    """

    def __init__(self, site: str, worker: str, pool: str, *, tell: Callable[[str], None]) -> None:
        pid = os.getpid()
        self.holder = Holder(
            site, worker, pool, socket.gethostname(), _machine(), pid, _born(pid) or "", secrets.token_hex(8)
        )
        self._name = variable_name(site)
        self._tell = tell
        self._id: UUID | None = None
        self._looked = 0.0

    async def hold(self, client: PrefectClient) -> bool:
        """Make the claim, or see to it that it still stands; returns whether it was made now.

        Raises:
            ConfigError: another process serves the site.
        """
        if self._id is not None:
            if time.monotonic() - self._looked < _LOOK_S:
                return False
            self._looked = time.monotonic()
            there = await client.read_variable_by_name(self._name)
            if there is not None and there.id == self._id:
                return False
        await self._make(client)
        self._looked = time.monotonic()
        return True

    async def release(self, client: PrefectClient) -> None:
        """Give the site up: without a claim its worker is no more, so that its record goes, too.
        Harmless when repeated.
        """
        if self._id is None:
            return
        await delete_worker(client, self.holder.pool, self.holder.worker)
        await delete_variable(client, self._id)
        self._id = None

    async def _make(self, client: PrefectClient) -> None:
        while True:
            try:
                made = await client.create_variable(
                    VariableCreate(name=self._name, value=asdict(self.holder), tags=["fedpool"])
                )
                self._id = made.id
                return
            except ObjectAlreadyExists:
                there = await client.read_variable_by_name(self._name)
            if there is None:
                continue
            holder = _holder(there.value)
            if holder == self.holder:  # only the answer was lost
                self._id = there.id
                return
            if holder is not None and await self._lives(client, holder):
                self._id = None
                raise ConfigError(
                    f"site {self.holder.site!r} is already served by {holder} (worker {holder.worker!r} of work pool "
                    f"{holder.pool!r}): stop that one first, or give this site another name"
                )
            await delete_variable(client, there.id)

    async def _lives(self, client: PrefectClient, holder: Holder) -> bool:
        """Whether a process is there, and not just its claim."""
        if holder.machine == _machine():
            return _born(holder.pid) == holder.born
        before = await _record(client, holder)
        if before is None or before.status != WorkerStatus.ONLINE:
            return False
        # Its heartbeats are compared with each other only, so that no clock matters.
        patience_s = _HEARTBEATS * (before.heartbeat_interval_seconds or 30)
        self._tell(f"{holder} has served this site: looking for its heartbeats for up to {patience_s:g} s")
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            await anyio.sleep(_HEARTBEAT_POLL_S)
            now = await _record(client, holder)
            if now is None or now.status != WorkerStatus.ONLINE:
                return False
            if now.last_heartbeat_time != before.last_heartbeat_time:
                return True
        return False


def variable_name(site: str) -> str:
    """Name of the variable that holds the claim to a site. Variables have lowercase names,
    without dots.
    """
    slug = re.sub(r"[^a-z0-9_-]", "-", site.lower())
    return f"fedpool-site-{slug}" + ("" if slug == site else f"-{hashlib.sha256(site.encode()).hexdigest()[:8]}")


async def _record(client: PrefectClient, holder: Holder) -> Worker | None:
    try:
        workers = await client.read_workers_for_work_pool(holder.pool)
    except ObjectNotFound:
        return None
    return next((worker for worker in workers if worker.name == holder.worker), None)


def _holder(value: Any) -> Holder | None:
    """Who a variable says holds a site; None when it does not say it in our way."""
    try:
        return Holder(**value)
    except TypeError:
        return None


def _machine() -> str:
    """What two processes that see each other have in common, and no others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process began; None when it is not there. On Linux in ticks since the boot, which
    no change of the clock moves.
    """
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except psutil.NoSuchProcess:
        return None
    except OSError:
        pass
    try:
        return str(round(psutil.Process(pid).create_time()))
    except psutil.NoSuchProcess:
        return None
