"""The cost of `make demo` on a fresh machine until the first round is committed: time, processor
time and disk.

    python benchmarks/setup.py [REVISION ...]

Clones each revision of this checkout (HEAD by default) into an empty folder, with empty caches of
pip and uv, and runs its `make demo`, one revision after the other. The processor time is that of
make and all processes below it, including those that have ended. The cache of a package registry
near you affects the figures, so compare only revisions of one run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def processor_s(process: psutil.Process) -> float:
    """Processor seconds of a process, its children that have ended, and its running descendants."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(revision: str, folder: Path) -> tuple[float, float, float]:
    """Seconds, processor seconds and GB on disk when `make demo` has committed its first round.

    Raises:
        RuntimeError: the command ended without one.
    """
    checkout = folder / "fedpool"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    subprocess.run(["git", "-C", str(checkout), "checkout", "--quiet", revision], check=True)
    caches = {"PIP_CACHE_DIR": str(folder / "pip"), "UV_CACHE_DIR": str(folder / "uv")}
    with (folder / "output").open("wb") as output:
        started = time.monotonic()
        make = psutil.Popen(
            ["make", "demo"], cwd=checkout, env={**os.environ, **caches}, stdout=output, stderr=subprocess.STDOUT
        )
        spent = 0.0
        while not any(checkout.glob("fedpool-runs/*/rounds/00000/round.json")):
            if make.poll() is not None:
                raise RuntimeError(f"make demo of {revision} ended first:\n{(folder / 'output').read_text()}")
            time.sleep(0.1)
            spent = max(spent, processor_s(make))
        elapsed = time.monotonic() - started
        make.wait()
    used = subprocess.run(["du", "-sk", str(checkout)], check=True, capture_output=True, text=True).stdout
    return elapsed, spent, int(used.split()[0]) / 1e6


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", default=["HEAD"], help="git revisions, each with a `make demo`")
    arguments = parser.parse_args()
    print("| revision | s to the first round | processor s | GB on disk |\n|---|---:|---:|---:|")
    for revision in arguments.revisions:
        with tempfile.TemporaryDirectory() as folder:
            elapsed, spent, disk = measure(revision, Path(folder))
        print(f"| {revision} | {elapsed:.0f} | {spent:.0f} | {disk:.1f} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
