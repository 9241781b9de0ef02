"""The value of late updates: accuracy after the same virtual time, by the rule for late updates.

The oracle's digits (see benchmarks/oracle.py): 10 sites, a Dirichlet(.1) label split, 5 local
epochs, for which site k of 1 to 10 needs k units of virtual time. In 500 units, a rule that waits
for all sites has 50 rounds of 10 units; a rule that closes a round after 5 updates has 100 rounds
of 5 units. Those 5 updates are always from the same sites, so the other sites have no part in the
model unless late updates count. A figure is the mean test accuracy of the last 5 models, averaged
over the seeds.

    python benchmarks/late_updates.py
    python benchmarks/late_updates.py --rules fold --seeds 1

Exits with 1 if a figure differs by more than .02 from the known one: folded .8785, dropped .7494,
all .8713.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fedpool import FedAvgRecipe, SimEnv

NUM_SITES = 10
BUDGET = 500.0
TOLERANCE = 0.02
NUM_SEEDS = 5
NUM_SCORED = 5
CLIENT = Path(__file__).resolve().parent / "oracle_client" / "client.py"
_QUORUM: Mapping[str, Any] = {"min_clients": 5, "quorum_grace": 0.0}


@dataclass(frozen=True)
class Rule:
    """A rule's fields, its number of rounds, and its known accuracy."""

    known: float
    num_rounds: int
    fields: Mapping[str, Any] = field(default_factory=dict)


RULES: Mapping[str, Rule] = {
    "all": Rule(0.8713, 50, {"min_clients": NUM_SITES}),
    "drop": Rule(0.7494, 100, {**_QUORUM, "late": "drop"}),
    "fold": Rule(0.8785, 100, {**_QUORUM, "late": "fold"}),
}


@dataclass(frozen=True)
class Outcome:
    """A job's accuracy, virtual time of the last training round, number of late updates that
    counted, and final weights.
    """

    accuracy: float
    virtual_time: float
    num_late: int
    weight: np.ndarray


def run_job(rule: Rule, *, seed: int, num_rounds: int, num_threads: int) -> Outcome:
    """Run one job in virtual time."""
    recipe = FedAvgRecipe(
        name="late-updates",
        num_rounds=num_rounds,
        model={"weight": torch.zeros(10, 65, dtype=torch.float64)},
        train_script=str(CLIENT),
        train_args=f"--alpha 0.1 --seed {seed} --sites {NUM_SITES} --epochs 5",
        seed=seed,
        **rule.fields,
    )
    with tempfile.TemporaryDirectory(prefix="fedpool-late-") as workspace:
        env = SimEnv(
            num_clients=NUM_SITES,
            num_threads=num_threads,
            workspace=Path(workspace),
            progress=False,
            speeds=[float(site + 1) for site in range(NUM_SITES)],
        )
        result = recipe.execute(env=env).get_result()
        weight = result.params["weight"].numpy().copy()
    trained = [record for record in result.rounds if record["task"] == "train"]
    return Outcome(
        fmean(entry["accuracy"] for entry in result.metrics[::-1][:NUM_SCORED]),
        trained[-1]["virtual_time"],
        sum(len(record.get("late_accepted", ())) for record in trained),
        weight,
    )


def main() -> int:
    """Run the chosen rules, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default=",".join(RULES), help=f"comma-separated: {','.join(RULES)}")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help=f"seeds 0 to N-1; only {NUM_SEEDS} are judged")
    parser.add_argument("--threads", type=int, default=2, help="sites that train at once in real time (default 2)")
    args = parser.parse_args()
    failed = False
    print("| late updates | rounds | late ones that counted | virtual time | known | accuracy |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in args.rules.split(","):
        rule, outcomes = RULES[name], []
        for seed in range(args.seeds):
            outcomes.append(run_job(rule, seed=seed, num_rounds=rule.num_rounds, num_threads=args.threads))
            print(f"{name} seed {seed}: {outcomes[-1].accuracy:.4f}", file=sys.stderr, flush=True)
        accuracy, first = fmean(outcome.accuracy for outcome in outcomes), outcomes[0]
        counts = f"{rule.num_rounds} | {first.num_late} | {first.virtual_time:g}"
        print(f"| {name} | {counts} | {rule.known:.4f} | {accuracy:.4f} |", flush=True)
        failed |= args.seeds == NUM_SEEDS and abs(accuracy - rule.known) > TOLERANCE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
