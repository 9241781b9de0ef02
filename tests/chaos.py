"""`make chaos`: kills or cuts off each component of a job at every stage of a round; writes the
matrix of docs/reliability.md.

Runs a proof of concept on PostgreSQL, with a store that can hold an operation (`fedpool.testing`),
so that a round stops at the requested stage. The component is then hit, and an operator's steps
follow (`fedpool poc up`, and `resume` for a job that did not complete). The job must end with the
bytes of an undisturbed one, or say why it did not.
"""

import argparse
import json
import multiprocessing
import random
import re
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal, cast

import numpy as np
import psutil

from fedpool import ConfigError, FedAvgRecipe, JobStatus, PocEnv, Run
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.testing import Fault, Faults
from tests.poc import scripts_of, wait_until, wait_until_gone
from tests.services import PostgresServer

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
SITES = ("site-1", "site-2", "site-3")
ROUNDS = 3
HANG_S = 240.0
CUT_S = 5.0

SCRIPT = """
    import pathlib, sys, threading
    import numpy as np
    import fedpool.client as flare

    folder = pathlib.Path(sys.argv[1])
    flare.init()
    while flare.is_running():
        model = flare.receive()
        site, round = flare.get_site_name(), model.current_round
        (folder / f"training-{site}-{round}").touch()
        while round == 1 and (folder / "hold").exists():
            threading.Event().wait(0.02)
        rng = np.random.default_rng(ord(site[-1]) * 1000 + round)
        w = model.params["w"] + rng.normal(size=model.params["w"].shape).astype(np.float32)
        flare.send(flare.FLModel(params={"w": w}))
"""

STAGES: dict[str, tuple[str, Literal["before", "after"]] | None] = {
    "before the model is published": ("rounds/00001/global", "before"),
    "after the model is published": ("rounds/00001/global", "after"),
    "training": None,
    "between update and manifest": ("rounds/00001/sites/{site}/update.json", "before"),
    "between two manifests": ("rounds/00001/sites/{site}/update.json", "before"),
    "between aggregation and commit": ("rounds/00001/round.json", "before"),
    "after the commit": ("rounds/00001/round.json", "after"),
}
COMPONENTS = ("coordinator", "worker", "session", "API server", "database", "store")
CONTEXT = multiprocessing.get_context("spawn")
Trial = tuple[str, str, int]
"""Component, stage and seed."""


class Bench:
    """A proof of concept that is broken and repaired."""

    def __init__(self, folder: Path, postgres: PostgresServer) -> None:
        self.folder = folder
        self.postgres = postgres
        self.faults = Faults(folder / "store")
        self.store = Store(self.faults.url)
        self.env = PocEnv(
            num_clients=len(SITES),
            store=self.faults.url,
            database=postgres.new_database(),
            home=folder / "poc",
            progress=False,
        )
        (folder / "client.py").write_text(textwrap.dedent(SCRIPT))
        self.recipe = FedAvgRecipe(
            name="chaos",
            min_clients=len(SITES),
            num_rounds=ROUNDS,
            model={"w": np.zeros(50, np.float32)},
            train_script=folder / "client.py",
            train_args=[str(folder)],
        )

    def undisturbed(self) -> list[bytes]:
        """The global models of an undisturbed job."""
        return self.models(self.recipe.execute(self.env).get_result().job_id)

    def models(self, job_id: str) -> list[bytes]:
        paths = JobPaths(job_id)
        return [self.store.read_bytes(paths.global_model(number)) for number in range(ROUNDS + 1)]

    def trial(self, component: str, stage: str, seed: int, honest: list[bytes]) -> str:
        """Hit a component at a stage; return the outcome."""
        rng = random.Random(f"{component}/{stage}/{seed}")
        site = rng.choice(SITES)
        for path in (*self.folder.glob("training-*"), self.folder / "hold"):
            path.unlink(missing_ok=True)
        self.env.up()
        held = STAGES[stage]
        if held is None:
            (self.folder / "hold").touch()
        else:
            match, when = held
            self.faults.plan(Fault("hold", match=match.format(site=site), operations=("write",), when=when))
        run = self.recipe.execute(self.env, wait=False)
        try:
            self._wait_until_held(run, stage, site)
            threading.Event().wait(rng.uniform(0.0, 0.5))
            self._hit(component, site)
        finally:
            (self.folder / "hold").unlink(missing_ok=True)
            self.faults.plan()
        self.env.up()
        return self._outcome(run, honest)

    def _wait_until_held(self, run: Run, stage: str, site: str) -> None:
        if STAGES[stage] is None:
            wait_until(lambda: all((self.folder / f"training-{name}-1").exists() for name in SITES))
            return
        self.faults.wait_until_held(120)
        if stage == "between two manifests":
            paths = JobPaths(run.job_id)
            others = [paths.manifest(1, name) for name in SITES if name != site]
            wait_until(lambda: all(self.store.exists(path) for path in others))

    def _hit(self, component: str, site: str) -> None:
        match component:
            case "coordinator":
                _kill(psutil.Process(self._pid("coordinator")).children(recursive=True))
            case "worker":
                _kill([psutil.Process(self._pid(site))])
            case "session":
                _kill(scripts_of(self.env.home / "sites" / site))
            case "API server":
                _kill([psutil.Process(self._pid("server"))])
            case "database":
                self.postgres.restart()
            case "store":
                self.faults.plan(Fault("fail"))
                threading.Event().wait(CUT_S)

    def _pid(self, name: str) -> int:
        pid = next(service.pid for service in self.env.status() if service.name == name)
        assert pid is not None, f"{name} does not run"
        return pid

    def _outcome(self, run: Run, honest: list[bytes]) -> str:
        resumed = 0
        while True:
            if not run.wait(HANG_S):
                run.abort()
                return "HANG"
            if run.get_status() is JobStatus.COMPLETED:
                break
            if resumed == 2:
                return f"failed: {self._failure(run)}"
            resumed += 1
            run = self._resume(run.job_id)
        wait_until_gone(scripts_of, self.env.home, 60)
        if self.models(run.job_id) != honest:
            return "OTHER BYTES"
        verify_job(self.store, run.job_id)
        return "resumed" if resumed else "went on"

    def _resume(self, job_id: str) -> Run:
        deadline = time.monotonic() + HANG_S
        while True:
            try:
                run: Run = self.recipe.execute(self.env, resume=job_id, wait=False)
                return run
            except ConfigError as error:  # until Prefect has noticed that the coordinator was killed
                if "has not ended" not in str(error) or time.monotonic() > deadline:
                    raise
                threading.Event().wait(1.0)

    def _failure(self, run: Run) -> str:
        try:
            run.get_result()
        except Exception as error:  # noqa: BLE001  # what it is, is what is asked
            return str(error).splitlines()[0]
        return "nothing"


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=120)


def table(outcomes: Mapping[Trial, str]) -> str:
    """The matrix: a row per stage, a column per component."""
    lines = ["| killed or cut | " + " | ".join(COMPONENTS) + " |"]
    lines.append("| -- |" + " -- |" * len(COMPONENTS))
    for stage in STAGES:
        cells = []
        for component in COMPONENTS:
            counted = Counter(
                outcome.partition(":")[0]
                for (hit, held, _), outcome in outcomes.items()
                if (hit, held) == (component, stage)
            )
            cells.append(", ".join(f"{count} {what}" for what, count in sorted(counted.items())) or "not run")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the matrix, write it down, and exit with 1 if a job hung, ended with other bytes or lost
    something.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--components", nargs="+", choices=COMPONENTS, default=COMPONENTS)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=tuple(STAGES))
    parser.add_argument(
        "--record", type=Path, help="file of outcomes: what is there is not tried again, what is tried is added"
    )
    parser.add_argument("--at-once", type=int, default=2, help="proofs of concept side by side (default 2)")
    parser.add_argument("--write", action="store_true", help="write the matrix to docs/reliability.md")
    arguments = parser.parse_args()
    if arguments.record and arguments.record.exists():
        known = [json.loads(line) for line in arguments.record.read_text().splitlines()]
    else:
        known = []
    outcomes = {(component, stage, seed): outcome for component, stage, seed, outcome in known}
    trials = [
        (component, stage, seed)
        for seed in range(arguments.seeds)
        for component in arguments.components
        for stage in arguments.stages
    ]
    for component, stage, seed, outcome in _side_by_side(
        [trial for trial in trials if trial not in outcomes], arguments.at_once
    ):
        outcomes[component, stage, seed] = outcome
        if arguments.record:
            with arguments.record.open("a") as file:
                file.write(json.dumps([component, stage, seed, outcome]) + "\n")
    made = table(outcomes)
    print(made)
    if arguments.write:
        page = PAGE.read_text()
        changed = re.sub(
            r"(?s)(<!-- chaos -->\n).*(<!-- /chaos -->)", lambda match: match[1] + made + "\n" + match[2], page
        )
        PAGE.write_text(changed)
    sys.exit(any(outcome in ("HANG", "OTHER BYTES") for outcome in outcomes.values()))


def _side_by_side(trials: Sequence[Trial], at_once: int) -> Iterator[tuple[str, str, int, str]]:
    """(component, stage, seed, outcome) of every trial, on `at_once` benches in parallel: a trial
    spends most of its time waiting.
    """
    benches = {}
    for share in (trials[number::at_once] for number in range(at_once)):
        if share:
            found, end = CONTEXT.Pipe(duplex=False)
            benches[found] = CONTEXT.Process(target=_report, args=(share, end))
            benches[found].start()
            end.close()  # so that the pipe ends when the bench does
    running = set(benches)
    while running:
        for found in cast(list[Connection], wait(running)):
            try:
                yield found.recv()
            except EOFError:
                running.remove(found)
    for bench in benches.values():
        bench.join()
    if any(bench.exitcode for bench in benches.values()):
        sys.exit("a bench broke: its trials are not complete")


def _report(trials: Sequence[Trial], end: Connection) -> None:
    for outcome in _try(trials):
        end.send(outcome)


def _try(trials: Sequence[Trial]) -> Iterator[tuple[str, str, int, str]]:
    """(component, stage, seed, outcome) of every trial, one after the other."""
    with tempfile.TemporaryDirectory(prefix="fedpool-chaos-") as folder, closing(PostgresServer()) as postgres:
        bench = Bench(Path(folder), postgres)
        try:
            bench.env.up()
            honest = bench.undisturbed()
            for component, stage, seed in trials:
                began = time.monotonic()
                outcome = bench.trial(component, stage, seed, honest)
                print(f"{component}, {stage}, seed {seed}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
                yield component, stage, seed, outcome
        finally:
            bench.faults.plan()
            bench.env.down()


if __name__ == "__main__":
    main()
