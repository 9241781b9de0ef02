"""Run one engine once and measure its time, rounds and memory from outside."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from memory import PeakMemory, machine_cpu_s
from sklearn.datasets import load_digits

ENGINES_FOLDER = Path(__file__).resolve().parent / "engines"
BEFORE = "before"
"""The virtual environment of an earlier fedpool, see `make bench-before`."""
PEERS = ("nvflare", "flower")
MARKER = "BENCH_MARKER"
STAMPS = "BENCH_STAMPS"
ENDING_S = 10.0
"""How long an engine's daemons may outlive it. Then they are stopped, to not burden the next
run.
"""


@dataclass(frozen=True)
class Engine:
    """A framework, and how to run it.

    Attributes:
        script: in the folder engines.
        peer: name of its virtual environment, or None for the interpreter that runs this script.
        per_site: one process per site over all rounds, instead of `--threads` at a time.
        max_sites: more would take hours.
        arguments: further ones for the script.
    """

    script: str
    peer: str | None = None
    per_site: bool = False
    max_sites: int = 1_000_000
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One job, given to every engine."""

    title: str
    workload: str
    num_sites: int
    num_rounds: int
    cold_sites: bool = False


@dataclass(frozen=True)
class Sample:
    """The cost of one run.

    Attributes:
        start_s: time until the first site received its first model.
        cpu_s: processor time of all its processes; lacks those that lived between two samples.
        score: that site's score of the last model that it received.
        other_cores: average number of cores that were busy with other work.
    """

    total_s: float
    cpu_s: float
    start_s: float
    round_s: tuple[float, ...]
    peak_bytes: int
    num_processes: int
    score: float
    other_cores: float


class EngineError(Exception):
    """An engine didn't finish its job; the message ends with the end of its output."""


def find_pythons(engines: Mapping[str, Engine], venvs: Path) -> dict[str, Path]:
    """The interpreter of each engine; exits with the remedy if one is missing."""
    pythons = {}
    for name, engine in engines.items():
        pythons[name] = venvs / engine.peer / "bin" / "python" if engine.peer else Path(sys.executable)
        if not pythons[name].exists():
            target = "bench-before COMMIT=..." if engine.peer == BEFORE else "bench-peers"
            sys.exit(f"{name} has no interpreter at {pythons[name]}: run `make {target}`, or give --peer-venvs")
    return pythons


def run_engine(engine: Engine, case: Case, python: Path, num_threads: int, timeout_s: float) -> Sample:
    """Run a case once.

    Raises:
        EngineError: the engine failed, timed out or left out a site in a round.
    """
    folder = Path(tempfile.mkdtemp(prefix="fpb-"))  # short, because Ray puts sockets there, and their paths are limited
    try:
        return _run_in(folder, engine, case, python, num_threads, timeout_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_in(folder: Path, engine: Engine, case: Case, python: Path, num_threads: int, timeout_s: float) -> Sample:
    marker = f"{MARKER}={uuid.uuid4().hex}"
    stamps, log = folder / "stamps.txt", folder / "output.txt"
    if case.workload == "digits":
        np.save(folder / "digits.npy", np.column_stack(load_digits(return_X_y=True)))
    command = [str(python), str(ENGINES_FOLDER / engine.script)]
    command += ["--workload", case.workload, "--sites", str(case.num_sites), "--rounds", str(case.num_rounds)]
    command += ["--threads", str(case.num_sites if engine.per_site else num_threads), "--workspace", str(folder / "w")]
    command += ["--cold-sites"] * case.cold_sites
    command += engine.arguments
    started_at, started, started_cpu_s = time.time(), time.perf_counter(), machine_cpu_s()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ENGINES_FOLDER,
            env=_environment(folder, marker),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    memory = PeakMemory(process.pid, marker=marker)
    try:
        with memory:
            code: int | str = process.wait(timeout_s)
            total_s = time.perf_counter() - started
            machine_s = machine_cpu_s() - started_cpu_s
    except subprocess.TimeoutExpired:
        code = f"none after {timeout_s:.0f} s"
    finally:  # also when the user interrupts, because the engine has its own session
        _end(memory, patience_s=ENDING_S if process.returncode == 0 else 0)
        process.wait()
    received = [line.split() for line in stamps.read_text().splitlines()] if stamps.exists() else []
    expected = {str(site): case.num_rounds for site in range(case.num_sites)}
    if code != 0 or Counter(site for site, _, _ in received) != expected:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise EngineError(f"exit code {code}; models received: {len(received)} of {sum(expected.values())}\n{tail}")
    first = [(float(at), float(score)) for site, at, score in received if site == "0"]
    round_s = tuple(after[0] - before[0] for before, after in pairwise(first))
    return Sample(
        total_s=total_s,
        cpu_s=memory.cpu_s,
        start_s=first[0][0] - started_at,
        round_s=round_s,
        peak_bytes=memory.peak_bytes,
        num_processes=memory.num_processes,
        score=first[-1][1],
        other_cores=max(0.0, machine_s - memory.cpu_s) / total_s,
    )


def _environment(folder: Path, marker: str) -> dict[str, str]:
    """The environment of an engine: the user's, without settings for these frameworks and
    without telemetry.
    """
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("FEDPOOL_", "PREFECT_", "RAY_", "FLWR_", "NVFLARE_"))
    }
    name, value = marker.split("=")
    return kept | {
        name: value,
        STAMPS: str(folder / "stamps.txt"),
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PREFECT_HOME": str(folder / "prefect"),
        "FLWR_HOME": str(folder / "flwr"),
        "RAY_TMPDIR": str(folder),
        "TMPDIR": str(folder),  # so that a killed engine leaves nothing behind
    }


def _end(memory: PeakMemory, *, patience_s: float) -> None:
    """Wait for the engine's processes, then stop those that are left. Only this run's processes
    are affected.
    """
    deadline = time.monotonic() + patience_s
    while (left := memory.members()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
