"""Federated averaging against a framework-free implementation: the same cases, the same accuracy within .02.

The oracle's figures come from plain numpy on the scikit-learn digits: softmax regression from zeros, 10 sites,
a Dirichlet(alpha) label split, 50 rounds, SGD with batch 16 and lr .1, weights = rows. A figure is the test accuracy
of the global model, the mean of the last 5 rounds and of the seeds.

Run it from the root of the repository; the whole table takes about a quarter of an hour on two cores:

    python benchmarks/oracle_job.py
    python benchmarks/oracle_job.py --rows fedavg-1 --seeds 1

Exits with 1 when a row is out of tolerance. A number of rounds other than 50 has no figure to be held against:
such a run prints its accuracies, judges nothing and exits with 0.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from fedpool import FedAvgRecipe, SimEnv

NUM_SITES = 10
NUM_ROUNDS = 50  # of the oracle's figures
NUM_SCORED = 5  # the last models, whose mean accuracy is the figure
TOLERANCE = 0.02
CLIENT = Path(__file__).resolve().parent / "oracle_client" / "client.py"


@dataclass(frozen=True)
class Case:
    """One row of the table: a label split, the local work, and the accuracy that the oracle reached."""

    name: str
    alpha: float
    epochs: int
    oracle: float


CASES = {
    case.name: case
    for case in (
        Case("fedavg-100", alpha=100, epochs=5, oracle=0.8903),
        Case("fedavg-1", alpha=1, epochs=5, oracle=0.8871),
        Case("fedavg-0.1", alpha=0.1, epochs=5, oracle=0.8704),
        Case("fedavg-20-epochs", alpha=0.1, epochs=20, oracle=0.8841),
    )
}


@dataclass(frozen=True)
class Row:
    """A case and what fedpool reached; `judged` is false where the oracle has no figure for the number of rounds."""

    case: Case
    ours: float
    judged: bool

    @property
    def difference(self) -> float:
        """Ours minus the oracle's."""
        return self.ours - self.case.oracle

    @property
    def failed(self) -> bool:
        """Whether the row is out of tolerance; NaN is."""
        return self.judged and not abs(self.difference) <= TOLERANCE

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        verdict = ("no" if self.failed else "yes") if self.judged else "not judged"
        return [self.case.name, f"{self.case.oracle:.4f}", f"{self.ours:.4f}", f"{self.difference:+.4f}", verdict]


HEADER = ["case", "oracle", "ours", "difference", "ok"]


def run_job(case: Case, *, seed: int, num_rounds: int, num_threads: int) -> float:
    """Run one job in simulation and return the mean test accuracy of its last `NUM_SCORED` global models.

    A site scores the model it receives, so entry r of the metrics belongs to global model r; the evaluation round
    at the end scores the last one.
    """
    recipe = FedAvgRecipe(
        name="oracle",
        min_clients=NUM_SITES,
        num_rounds=num_rounds,
        model={"weight": torch.zeros(10, 65)},
        train_script=str(CLIENT),
        train_args=f"--alpha {case.alpha} --seed {seed} --sites {NUM_SITES} --epochs {case.epochs}",
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="fedpool-oracle-") as workspace:
        env = SimEnv(num_clients=NUM_SITES, num_threads=num_threads, workspace=Path(workspace), progress=False)
        metrics = recipe.execute(env=env).get_result().metrics
    assert len(metrics) == num_rounds + 1, f"{len(metrics)} scores of {num_rounds + 1} global models"
    return fmean(entry["accuracy"] for entry in metrics[-NUM_SCORED:])


def as_text(rows: list[Row]) -> str:
    """Return the table with its columns aligned."""
    table = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)


def as_markdown(rows: list[Row]) -> str:
    """Return the table as markdown."""
    table = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def case_names(text: str) -> list[str]:
    """Return the names in a comma-separated list.

    Raises argparse.ArgumentTypeError for a name that is no case.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(unknown)}; there are {', '.join(CASES)}")
    return names


def at_least_one(text: str) -> int:
    """Return the number in `text`.

    Raises argparse.ArgumentTypeError for anything but a whole number from 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def main() -> int:
    """Run the chosen rows, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=case_names, default=list(CASES), help=f"comma-separated: {','.join(CASES)}")
    parser.add_argument("--seeds", type=at_least_one, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--rounds", type=at_least_one, default=NUM_ROUNDS, help="only 50, the default, is judged")
    parser.add_argument("--threads", type=at_least_one, default=2, help="sites that train at once (default 2)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well")
    args = parser.parse_args()

    rows = []
    for name in args.rows:
        scores = []
        for seed in range(args.seeds):
            score = run_job(CASES[name], seed=seed, num_rounds=args.rounds, num_threads=args.threads)
            print(f"{name} seed {seed}: {score:.4f}", file=sys.stderr, flush=True)
            scores.append(score)
        rows.append(Row(CASES[name], fmean(scores), judged=args.rounds == NUM_ROUNDS))
    print(as_text(rows))
    if args.markdown:
        args.markdown.write_text(as_markdown(rows), encoding="utf-8")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
