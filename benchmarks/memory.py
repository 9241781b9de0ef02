"""Peak memory, as summed PSS, and processor time of everything that one command starts. Linux only.

PSS (proportional set size) counts a page that n processes share as 1/n in each, so the sum counts
every page once. Resident sizes would charge a forked process for memory that it doesn't use.
"""

import os
import threading
import time
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
INTERVAL_S = 0.05
MAX_LOAD = 0.05
"""Share of one core for sampling: reading one torch process takes 3-4 ms, which would slow it
down.
"""


class PeakMemory:
    """Samples a process tree from a thread, as a context manager.

    The tree is the root, its descendants, and every process with `marker` in its environment,
    because daemons leave their parent. A process stays in the tree once seen, because some
    overwrite their environment to change their title.

    Attributes:
        peak_bytes: the largest sum so far.
        num_processes: the number of processes in that sum.
    """

    def __init__(self, root: int, *, marker: str) -> None:
        self.peak_bytes = 0
        self.num_processes = 0
        self._marker = marker.encode()
        status = _status(PROC / str(root))
        self._seen = {root: status[1]} if status else {}  # pid -> start time, because pids are reused
        self._cpu_s: dict[tuple[int, str], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """Processor time of the tree at the last sample; lacks processes that lived between two
        samples.
        """
        return sum(self._cpu_s.values())

    def members(self) -> set[int]:
        """The current pids of the tree, without zombies."""
        table = {}
        for entry in PROC.iterdir():
            if entry.name.isdigit() and (status := _status(entry)):
                table[int(entry.name)] = status
        found = {
            pid
            for pid, (_, start, _) in table.items()
            if self._seen.get(pid) == start or self._marker in _read(PROC / str(pid) / "environ")
        }
        grew = True
        while grew:
            children = {pid for pid, (parent, _, _) in table.items() if parent in found} - found
            found |= children
            grew = bool(children)
        self._seen = {pid: table[pid][1] for pid in found}
        self._cpu_s |= {(pid, table[pid][1]): table[pid][2] for pid in found}
        return found

    def _sample(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            started = time.perf_counter()
            sizes = [size for pid in self.members() if (size := _pss_bytes(pid))]
            if sum(sizes) > self.peak_bytes:
                self.peak_bytes, self.num_processes = sum(sizes), len(sizes)
            pause = max(INTERVAL_S, (time.perf_counter() - started) * (1 / MAX_LOAD - 1))


def machine_cpu_s() -> float:
    """Processor time that the machine has spent on everything since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, _read(PROC / "stat").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _status(entry: Path) -> tuple[int, str, float] | None:
    """Parent, start time and processor seconds of a process; None if it has ended."""
    fields = _read(entry / "stat").rpartition(b")")[2].split()  # the name before ")" may contain anything
    if not fields or fields[0] in b"ZX":
        return None
    return int(fields[1]), fields[19].decode(), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _pss_bytes(pid: int) -> int:
    for line in _read(PROC / str(pid) / "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> bytes:
    """The file's content; empty if its process has ended or belongs to another user."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
