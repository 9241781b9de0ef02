"""The speed of every aggregator, compared with a limit of the machine: reading the same files and
adding them up with torch.

Eight updates of 300 MB in local files are aggregated through the store like in a round: read block
by block, combined in float64, and the next model written and hashed. Rates are bytes of updates per
second; `of limit` is the rate divided by that of the limit, which reads each file and adds it to a
sum in float32, and writes nothing. Memory is the peak beyond that of the process after its imports,
in models. Every measurement is a process of its own that runs twice and counts the second run:
memory that a virtual machine touches for the first time costs several times what it costs later,
and aggregators that write a model touch the most. Repeats go through all aggregators in turn. Linux
only.

    python benchmarks/aggregate.py
    python benchmarks/aggregate.py --megabytes 30 --repeat 1

With --judge, exits with 1 if the mean reaches less than .7 of the limit or any aggregator takes two
models of memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

NUM_UPDATES = 8
NUM_LAYERS = 12
LIMIT = "limit"
LEAST_OF_LIMIT, MOST_MODELS = 0.7, 2.0
PARAMETERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {},
    "trimmed_mean": {"trim_ratio": 0.2},
    "krum": {"num_byzantine": 1},
    "multi_krum": {"num_byzantine": 1},
    "bulyan": {"num_byzantine": 1},
    "geometric_median": {},
    "norm_clipped_mean": {"clip_norm": 1.0},
    "fedadam": {},
}


def make_files(folder: Path, megabytes: float) -> None:
    """Write the global model and the updates, each of `NUM_LAYERS` float32 layers."""
    import torch
    from safetensors.torch import save_file

    size = int(megabytes * 1e6 / 4 / NUM_LAYERS)
    for number in range(NUM_UPDATES + 1):
        generator = torch.Generator().manual_seed(number)
        layers = {f"layer-{n:02d}": torch.randn(size, generator=generator) for n in range(NUM_LAYERS)}
        save_file(layers, folder / f"{number}.safetensors")


def limit(folder: Path) -> Callable[[], None]:
    """The limit of the machine: read every update into memory, and add it to a sum."""
    import torch

    size = (folder / "1.safetensors").stat().st_size // 4

    def run() -> None:
        total = torch.zeros(size)
        buffer = torch.empty(size)
        view = memoryview(buffer.numpy()).cast("B")
        for number in range(1, NUM_UPDATES + 1):
            with (folder / f"{number}.safetensors").open("rb", buffering=0) as file:
                position = 0
                while count := file.readinto(view[position:]):
                    position += count
            total += buffer

    return run


def ours(name: str, folder: Path) -> Callable[[], None]:
    """A round's aggregation through the store."""
    from fedpool.checked import CheckedTensors, take_tags
    from fedpool.flows.fedavg import FedAvg
    from fedpool.flows.fedopt import FedOpt
    from fedpool.messages import UpdateManifest
    from fedpool.store import Store
    from fedpool.tasks.aggregate import Before, aggregate
    from fedpool.tasks.aggregators import AGGREGATORS, Mean
    from fedpool.tasks.gate import Accepted
    from fedpool.tasks.optimizers import Adaptive, Schedule

    store = Store(folder)

    def reader(number: int) -> Any:
        opened = store.tensors(f"{number}.safetensors", (folder / f"{number}.safetensors").stat().st_size)
        _, tags = take_tags(opened, store.block_elements)  # as the gate has
        return CheckedTensors(opened, lambda: tags)

    if name == "fedadam":
        strategy: Any = FedOpt(Mean(), Adaptive("adam", Schedule(0.1), 0.9, 0.99, 1e-3))
    else:
        strategy = FedAvg(AGGREGATORS[name](**PARAMETERS[name]))
    updates = []
    for number in range(1, NUM_UPDATES + 1):
        manifest = UpdateManifest(
            job_id="job",
            site=f"site-{number}",
            round=0,
            task="train",
            base_sha256="",
            assignment_sha256="",
            params_type="FULL",
            seconds=0.0,
        )
        updates.append(Accepted(manifest, "", float(number), reader(number)))

    def run() -> None:
        aggregate(
            strategy,
            store=store,
            before=Before(reader(0)),
            updates=updates,
            factors={},
            target="next.safetensors",
            state_target="state.safetensors",
        )

    return run


def measure(name: str, folder: Path) -> dict[str, float]:
    """Seconds, and the peak of memory in bytes beyond what the process had before."""
    import torch

    torch.set_num_threads(1)
    run = limit(folder) if name == LIMIT else ours(name, folder)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    for _ in range(2):
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        for left in ("next.safetensors", "state.safetensors"):
            (folder / left).unlink(missing_ok=True)
    after = _resident("VmHWM")
    return {"seconds": seconds, "bytes": after - before}


def _resident(what: str) -> float:
    """Resident memory of this process in bytes: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def main() -> int:
    """Measure, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=300.0, help="size of the model (default 300)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each; the median counts")
    parser.add_argument("--judge", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.folder)))
        return 0

    names = [LIMIT, *PARAMETERS]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="fedpool-aggregate-") as place:
        folder = Path(place)
        make_files(folder, args.megabytes)
        for _ in range(args.repeat):
            for name in names:
                command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
                found[name].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    seconds = {name: median(sample["seconds"] for sample in samples) for name, samples in found.items()}
    models = {name: max(s["bytes"] for s in samples) / (args.megabytes * 1e6) for name, samples in found.items()}
    total = NUM_UPDATES * args.megabytes / 1e3
    print(f"{'aggregator':<18} {'GB/s':>6} {'of limit':>9} {'memory, models':>15}")
    for name in names:
        rate, share = total / seconds[name], seconds[LIMIT] / seconds[name]
        print(f"{name:<18} {rate:>6.2f} {share:>9.2f} {models[name]:>15.2f}")
    missed = seconds[LIMIT] / seconds["mean"] < LEAST_OF_LIMIT
    missed |= max(share for name, share in models.items() if name != LIMIT) >= MOST_MODELS
    return int(missed and args.judge)


if __name__ == "__main__":
    sys.exit(main())
