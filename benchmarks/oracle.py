"""Every algorithm against a framework-free implementation: the same cases, the same accuracy.

The oracle's figures come from plain numpy on the scikit-learn digits: softmax regression from zeros, 10 sites,
a Dirichlet(alpha) label split, 50 rounds, SGD with batch 16 and lr .1, weights = rows. A figure is the test accuracy
of the global model, the mean of the last 5 rounds and of the seeds. Server optimizers: beta1 .9, beta2 .99, tau 1e-3.
SCAFFOLD is option II. Cyclic trains one epoch a site, and a round of its figure is a turn of every site. A hostile site sends
its update times -10. Robust rules: trim .2 a side, Krum f = 2, multi-Krum m = 6.

Run it from the root of the repository; the whole table takes about an hour on two cores:

    python benchmarks/oracle.py
    python benchmarks/oracle.py --rows fedavg-1,krum --seeds 1

Exits with 1 when a row is out of tolerance: .02, or .03 where sites are hostile. A number of rounds other than 50 has no figure
to be held against: such a run prints its accuracies, judges nothing and exits with 0.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedpool import (
    CyclicRecipe,
    DiLoCoRecipe,
    FedAvgRecipe,
    FedOptRecipe,
    FedProxRecipe,
    Recipe,
    ScaffoldRecipe,
    SimEnv,
)

NUM_SITES = 10
NUM_ROUNDS = 50  # of the oracle's figures
WITH_TORCH = (ScaffoldRecipe, FedProxRecipe)
NUM_SCORED = 5  # the last models, whose mean accuracy is the figure
CLIENT = Path(__file__).resolve().parent / "oracle_client" / "client.py"


@dataclass(frozen=True)
class Case:
    """One row of the table: a recipe, a label split, the local work, and the accuracy that the oracle reached."""

    name: str
    oracle: float
    recipe: Callable[..., Recipe] = FedAvgRecipe
    fields: Mapping[str, Any] = field(default_factory=dict)
    alpha: float = 0.1
    epochs: int = 5
    num_hostile: int = 0
    turns: int = 1  # rounds of a job that are one round of the figure

    @property
    def tolerance(self) -> float:
        """How far ours may be from the oracle's."""
        return 0.03 if self.num_hostile else 0.02


def hostile(name: str, oracle: float, num_hostile: int = 2, **fields: Any) -> Case:
    """A row with hostile sites among ten that are alike."""
    return Case(name, oracle, fields=fields, alpha=100, num_hostile=num_hostile)


CASES = {
    case.name: case
    for case in (
        Case("fedavg-100", 0.8903, alpha=100),
        Case("fedavg-1", 0.8871, alpha=1),
        Case("fedavg-0.1", 0.8704),
        Case("fedavg-20-epochs", 0.8841, epochs=20),
        Case("scaffold-20-epochs", 0.9033, ScaffoldRecipe, epochs=20),
        Case("fedprox-20-epochs", 0.8718, FedProxRecipe, {"fedprox_mu": 0.1}, epochs=20),
        Case("fedadam", 0.8982, FedOptRecipe, {"server_optimizer": "adam"}),
        Case("fedyogi", 0.8978, FedOptRecipe, {"server_optimizer": "yogi"}),
        Case("fedadagrad", 0.8592, FedOptRecipe, {"server_optimizer": "adagrad"}),
        Case("diloco", 0.9006, DiLoCoRecipe),
        Case("cyclic", 0.8922, CyclicRecipe, epochs=1, turns=NUM_SITES),
        hostile("hostile-mean", 0.1006),
        hostile("hostile-median", 0.8734, aggregator="median"),
        hostile("hostile-trimmed-mean", 0.8713, aggregator="trimmed_mean", trim_ratio=0.2),
        hostile("hostile-krum", 0.8689, aggregator="krum", num_byzantine=2),
        hostile("hostile-multi-krum", 0.8830, aggregator="multi_krum", num_byzantine=2, num_selected=6),
        hostile("hostile-geometric-median", 0.8777, aggregator="geometric_median"),
        hostile("hostile-bulyan", 0.8808, 1, aggregator="bulyan", num_byzantine=1),
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
        return self.judged and not abs(self.difference) <= self.case.tolerance

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
    arguments = f"--alpha {case.alpha} --seed {seed} --sites {NUM_SITES} --epochs {case.epochs}"
    common: dict[str, Any] = {} if case.recipe is CyclicRecipe else {"min_clients": NUM_SITES}
    recipe = case.recipe(
        name="oracle",
        num_rounds=num_rounds * case.turns,
        model={"weight": torch.zeros(10, 65)},
        train_script=str(CLIENT),
        train_args=f"{arguments} --hostile {case.num_hostile}" + " --torch" * (case.recipe in WITH_TORCH),
        seed=seed,
        **common,
        **case.fields,
    )
    with tempfile.TemporaryDirectory(prefix="fedpool-oracle-") as workspace:
        env = SimEnv(num_clients=NUM_SITES, num_threads=num_threads, workspace=Path(workspace), progress=False)
        metrics = recipe.execute(env=env).get_result().metrics
    assert len(metrics) == recipe.num_rounds + 1, f"{len(metrics)} scores of {recipe.num_rounds + 1} global models"
    return fmean(entry["accuracy"] for entry in metrics[:: -case.turns][:NUM_SCORED])


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
