"""Compares every algorithm with a framework-free implementation: the same cases, the same weights.

The oracle's figures come from plain numpy on the scikit-learn digits: softmax regression from
zeros, 10 sites, a Dirichlet(alpha) label split, 50 rounds, SGD with batch 16 and lr .1, weights =
rows. A figure is the test accuracy of the global model, averaged over the last 5 rounds and the
seeds. Server optimizers: beta1 .9, beta2 .99, tau 1e-3. SCAFFOLD is option II. Cyclic trains one
epoch per site, and a round of its figure is one turn of every site. A hostile site sends its update
times -10. Robust rules: trim .2 per side, Krum f = 2, multi-Krum m = 6.

Sites draw the oracle's random numbers, so seed 0 must give the oracle's final model, and all seeds
its accuracies. With hostile sites, all updates have the same weight. Where the oracle differs from
the paper, the row has a field for it: FedAdagrad's beta1 is .9, SCAFFOLD weights the model but not
the variates, Bulyan's median is a midpoint, the geometric median has no weights.

Run it from the root of the repository; the whole table is 90 jobs of some 10 s each on two cores:

    python benchmarks/oracle.py
    python benchmarks/oracle.py --rows fedavg-1,krum --seeds 1

Exits with 1 if a row is out of tolerance: 1e-9 for the weights of seed 0's final model, the
rounding of the oracle's figures for accuracies. The oracle has figures only for 50 rounds: a run
with another number of rounds prints its accuracies, judges nothing and exits with 0.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fedpool import (
    Bulyan,
    CyclicRecipe,
    DiLoCoRecipe,
    FedAvgRecipe,
    FedOptRecipe,
    FedProxRecipe,
    GeometricMedian,
    Krum,
    MultiKrum,
    Recipe,
    ScaffoldRecipe,
    SimEnv,
    TrimmedMean,
)

NUM_SITES = 10
NUM_ROUNDS = 50  # of the oracle's figures
NUM_SEEDS = 5  # of the oracle's mean accuracies
TOLERANCES = (0.00005 + 1e-12, 5e-7, 1e-9)
"""For the mean accuracy, given to four digits; for seed 0's accuracy, given to six; and for its
final model.
"""
WITH_TORCH = (ScaffoldRecipe, FedProxRecipe)
NUM_SCORED = 5  # the number of last models whose mean accuracy is the figure
CLIENT = Path(__file__).resolve().parent / "oracle_client" / "client.py"


@dataclass(frozen=True)
class Model:
    """The oracle's final model: the sum of its absolute values, and two of its (65, 10) weights."""

    total: float
    weight_20_3: float
    weight_64_0: float

    @classmethod
    def of(cls, weight: np.ndarray) -> "Model":
        """The same values of our (10, 65) weight."""
        return cls(float(np.abs(weight).sum()), float(weight[3, 20]), float(weight[0, 64]))

    def difference(self, other: "Model") -> float:
        """The largest difference, relative for values above 1."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return max(abs(one - two) / max(1.0, abs(two)) for one, two in pairs)


@dataclass(frozen=True)
class Case:
    """One row of the table: a recipe, a label split, the local work, and the oracle's figures.

    `mean` is the accuracy over five seeds, to four digits; `first` and `model` are the accuracy and
    the final model of seed 0.
    """

    name: str
    mean: float
    first: float
    model: Model
    recipe: Callable[..., Recipe] = FedAvgRecipe
    fields: Mapping[str, Any] = field(default_factory=dict)
    alpha: float = 0.1
    epochs: int = 5
    num_hostile: int = 0
    turns: int = 1  # rounds of a job that are one round of the figure


def hostile(name: str, mean: float, first: float, model: Model, num_hostile: int = 2, **fields: Any) -> Case:
    """A row with hostile sites among ten sites with the same mix of labels."""
    return Case(name, mean, first, model, fields=fields, alpha=100, num_hostile=num_hostile)


CASES = {
    case.name: case
    for case in (
        Case("fedavg-100", 0.8903, 0.890000, Model(243.7324440274, 0.932734443176, 0.042184398625), alpha=100),
        Case("fedavg-1", 0.8871, 0.888333, Model(240.3087682706, 0.879384487865, 0.039361927655), alpha=1),
        Case("fedavg-0.1", 0.8704, 0.873889, Model(251.1599710253, 0.623535775727, 0.057238519451)),
        Case("fedavg-20-epochs", 0.8841, 0.886111, Model(351.5245092734, 0.781633476377, 0.125688782257), epochs=20),
        Case(
            "scaffold-20-epochs",
            0.9033,
            0.902778,
            Model(429.8703152198, 1.046257418782, 0.067731774110),
            ScaffoldRecipe,
            {"weighted": "model"},
            epochs=20,
        ),
        Case(
            "fedprox-20-epochs",
            0.8718,
            0.875000,
            Model(237.3242110210, 0.637021655006, 0.053964164136),
            FedProxRecipe,
            {"fedprox_mu": 0.1},
            epochs=20,
        ),
        Case(
            "fedadam",
            0.8982,
            0.886667,
            Model(854.6879242797, 1.795141256225, -0.430286493885),
            FedOptRecipe,
            {"server_optimizer": "adam"},
        ),
        Case(
            "fedyogi",
            0.8978,
            0.887222,
            Model(829.9490924143, 1.766857257324, -0.427533507876),
            FedOptRecipe,
            {"server_optimizer": "yogi"},
        ),
        Case(
            "fedadagrad",
            0.8592,
            0.861667,
            Model(290.6396686458, 0.685020889103, -0.169999142308),
            FedOptRecipe,
            {"server_optimizer": "adagrad", "beta1": 0.9},
        ),
        Case("diloco", 0.9006, 0.891667, Model(619.0403409822, 1.400846289349, -0.021575857183), DiLoCoRecipe),
        Case(
            "cyclic",
            0.8922,
            0.890556,
            Model(293.8970590621, 0.972267734365, 0.056772636297),
            CyclicRecipe,
            epochs=1,
            turns=NUM_SITES,
        ),
        hostile("hostile-mean", 0.1006, 0.100000, Model(9623.0853938717, -18.997962853524, -22.450067701401)),
        hostile(
            "hostile-median",
            0.8734,
            0.878333,
            Model(229.1551890394, 1.006652492074, 0.027433045875),
            aggregator="median",
        ),
        hostile(
            "hostile-trimmed-mean",
            0.8713,
            0.874444,
            Model(223.4508054858, 0.928137999306, -0.021592284775),
            aggregator=TrimmedMean(trim_ratio=0.2),
        ),
        hostile(
            "hostile-krum",
            0.8689,
            0.877222,
            Model(249.5156028699, 0.830299075802, -0.016439816523),
            aggregator=Krum(num_byzantine=2),
        ),
        hostile(
            "hostile-multi-krum",
            0.8830,
            0.893333,
            Model(245.2883964721, 0.873790188850, 0.037590709509),
            aggregator=MultiKrum(num_byzantine=2, num_selected=6),
        ),
        hostile(
            "hostile-geometric-median",
            0.8777,
            0.886111,
            Model(229.3917745242, 0.933478206191, 0.017369615189),
            aggregator=GeometricMedian(weighted=False),
        ),
        hostile(
            "hostile-bulyan",
            0.8808,
            0.882778,
            Model(246.4910769517, 1.353214148821, -0.012382529463),
            1,
            aggregator=Bulyan(num_byzantine=1, even_median="midpoint"),
        ),
    )
}


@dataclass(frozen=True)
class Outcome:
    """The result of one job."""

    accuracy: float
    model: Model


@dataclass(frozen=True)
class Row:
    """A case and fedpool's outcome for each seed; `judged` is false if the oracle has no figure
    for the number of rounds.
    """

    case: Case
    outcomes: Sequence[Outcome]
    judged: bool

    @property
    def ours(self) -> float:
        """Mean accuracy of the seeds."""
        return fmean(outcome.accuracy for outcome in self.outcomes)

    @property
    def differences(self) -> tuple[float, float, float]:
        """Our figures minus the oracle's: the mean accuracy if all seeds were run, and accuracy
        and final model of seed 0.
        """
        first = self.outcomes[0]
        of_mean = self.ours - self.case.mean if len(self.outcomes) == NUM_SEEDS else 0.0
        return of_mean, first.accuracy - self.case.first, first.model.difference(self.case.model)

    @property
    def failed(self) -> bool:
        """Whether the row is out of tolerance; so is NaN."""
        pairs = zip(self.differences, TOLERANCES, strict=True)
        return self.judged and not all(abs(difference) <= tolerance for difference, tolerance in pairs)

    def cells(self) -> list[str]:
        """The row as text, in the order of `header`."""
        verdict = ("no" if self.failed else "yes") if self.judged else "not judged"
        distance = f"{self.differences[2]:.0e}" if self.judged else ""
        means = [f"{self.case.mean:.4f}", f"{self.ours:.4f}"] if len(self.outcomes) == NUM_SEEDS else []
        first = self.outcomes[0].accuracy
        return [self.case.name, f"{self.case.first:.6f}", f"{first:.6f}", distance, *means, verdict]


def header(rows: Sequence[Row]) -> list[str]:
    """Names of the columns: accuracies of seed 0, difference of its final model, and the means
    of all seeds if all were run.
    """
    means = ["oracle, 5 seeds", "ours, 5 seeds"] if len(rows[0].outcomes) == NUM_SEEDS else []
    return ["case", "oracle", "ours", "final model differs by", *means, "ok"]


def run_job(case: Case, *, seed: int, num_rounds: int, num_threads: int) -> Outcome:
    """Simulate one job, and return the mean accuracy of its last `NUM_SCORED` global models and the
    last model.

    A site scores the model that it receives, so entry r of the metrics belongs to global model r;
    the evaluation round at the end scores the last one.
    """
    arguments = f"--alpha {case.alpha} --seed {seed} --sites {NUM_SITES} --epochs {case.epochs}"
    arguments += f" --hostile {case.num_hostile}" + " --alike" * (case.num_hostile > 0)
    arguments += " --torch" * (case.recipe in WITH_TORCH) + " --cyclic" * (case.recipe is CyclicRecipe)
    common: dict[str, Any] = {} if case.recipe is CyclicRecipe else {"min_clients": NUM_SITES}
    recipe = case.recipe(
        name="oracle",
        num_rounds=num_rounds * case.turns,
        model={"weight": torch.zeros(10, 65, dtype=torch.float64)},
        train_script=str(CLIENT),
        train_args=arguments,
        seed=seed,
        **common,
        **case.fields,
    )
    with tempfile.TemporaryDirectory(prefix="fedpool-oracle-") as workspace:
        env = SimEnv(num_clients=NUM_SITES, num_threads=num_threads, workspace=Path(workspace), progress=False)
        result = recipe.execute(env=env).get_result()
        weight = result.params["weight"].numpy().copy()
    metrics = result.metrics
    assert len(metrics) == recipe.num_rounds + 1, f"{len(metrics)} scores of {recipe.num_rounds + 1} global models"
    accuracy = fmean(entry["accuracy"] for entry in metrics[:: -case.turns][:NUM_SCORED])
    return Outcome(accuracy, Model.of(weight))


def as_text(rows: list[Row]) -> str:
    """Return the table with its columns aligned."""
    table = [header(rows), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)


def as_markdown(rows: list[Row]) -> str:
    """Return the table as markdown."""
    names = header(rows)
    table = [names, ["---"] * len(names), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def case_names(text: str) -> list[str]:
    """Return the names in a comma-separated list.

    Raises argparse.ArgumentTypeError for an unknown name.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(unknown)}; there are {', '.join(CASES)}")
    return names


def at_least_one(text: str) -> int:
    """Return the number in `text`.

    Raises argparse.ArgumentTypeError if it isn't a whole number from 1.
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
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to this file")
    args = parser.parse_args()

    rows = []
    for name in args.rows:
        outcomes = []
        for seed in range(args.seeds):
            outcome = run_job(CASES[name], seed=seed, num_rounds=args.rounds, num_threads=args.threads)
            print(f"{name} seed {seed}: {outcome.accuracy:.4f}", file=sys.stderr, flush=True)
            outcomes.append(outcome)
        rows.append(Row(CASES[name], outcomes, judged=args.rounds == NUM_ROUNDS))
    print(as_text(rows))
    if args.markdown:
        args.markdown.write_text(as_markdown(rows), encoding="utf-8")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
