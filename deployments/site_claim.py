"""A site's claim on the Prefect server, so that only one process serves the site.

The claim is a Prefect variable, because creating one is atomic, and deleting one by its id never
deletes a later one with the same name. A claim whose process is gone does not count: on the same
machine the process itself is looked up, elsewhere its worker's heartbeats.
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
"""Interval at which a process checks its claim."""
_HEARTBEATS = 2
"""A worker that misses this many heartbeats counts as dead, and may be replaced."""
_HEARTBEAT_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that serves a site.

    Attributes:
        machine: identifies the machine, its boot, and the container, whose processes are not
            visible from others.
        born: start of the process by the machine's own count; distinguishes later processes with
            the same pid.
        token: distinguishes it from all other processes.
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
    """This process's claim to serve a site.

    Args:
        site: the site's name.
        worker: name of this process's worker.
        pool: the worker's pool.
        tell: called with a message if there is a wait.
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
        """Make the claim, or check that it still stands; returns whether it was made now.

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
        """Release the site, and remove the worker's record. Idempotent."""
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
            if holder == self.holder:  # the claim was made, and only the answer was lost
                self._id = there.id
                return
            if holder is not None and await self._lives(client, holder):
                self._id = None
                raise ConfigError(
                    f"site {self.holder.site!r} is already served by {holder} (worker {holder.worker!r} of work pool "
                    f"{holder.pool!r}): stop that process first, or give this site another name"
                )
            await delete_variable(client, there.id)

    async def _lives(self, client: PrefectClient, holder: Holder) -> bool:
        """Whether the process still exists, and not only its claim."""
        if holder.machine == _machine():
            return _born(holder.pid) == holder.born
        before = await _record(client, holder)
        if before is None or before.status != WorkerStatus.ONLINE:
            return False
        # Its heartbeats are compared only with each other, so no clock matters.
        patience_s = _HEARTBEATS * (before.heartbeat_interval_seconds or 30)
        self._tell(f"{holder} has a claim on this site: waiting up to {patience_s:g} s for a heartbeat of it")
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
    """Name of the variable that holds a site's claim: lowercase letters, and no dots."""
    slug = re.sub(r"[^a-z0-9_-]", "-", site.lower())
    return f"fedpool-site-{slug}" + ("" if slug == site else f"-{hashlib.sha256(site.encode()).hexdigest()[:8]}")


async def _record(client: PrefectClient, holder: Holder) -> Worker | None:
    try:
        workers = await client.read_workers_for_work_pool(holder.pool)
    except ObjectNotFound:
        return None
    return next((worker for worker in workers if worker.name == holder.worker), None)


def _holder(value: Any) -> Holder | None:
    """The holder named by a variable; None if its format is unknown."""
    try:
        return Holder(**value)
    except TypeError:
        return None


def _machine() -> str:
    """Identifies this machine among processes that can see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process began; None if it does not exist.

    On Linux this is in ticks since the boot, which changes of the clock do not affect.
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
