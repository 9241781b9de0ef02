"""Late updates in virtual time, compared with a naive numpy reference weight for weight; and, as
slow tests, what they are worth.
"""

import importlib.util
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import numpy as np
import pytest

from tests.test_oracle import Array, Reference

ROOT = Path(__file__).parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("late_updates", ROOT / "benchmarks" / "late_updates.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = _load()


class Orders(Reference):
    """The reference's sites, in any order of training: each round and site has its own batches."""

    def __init__(self, num_rounds: int) -> None:
        super().__init__(alpha=0.1, epochs=5, num_hostile=0)
        sizes = [len(rows) for rows in self.rows]
        self.drawn = [[[self.rng.permutation(size) for _ in range(5)] for size in sizes] for _ in range(num_rounds)]

    def difference(self, start: Array, site: int, round: int) -> Array:
        orders = iter(self.drawn[round][site])

        class Drawn:
            def permutation(self, _: int) -> object:
                return next(orders)

        self.rng = Drawn()  # type: ignore[assignment]  # what is drawn of it is drawn already
        return self.trained(start, site)[0] - start


def folded(num_rounds: int) -> Array:
    """w <- w + sum n s Delta / sum n s: a quorum of 5 fresh updates closes a round; site k
    takes k + 1 units.
    """
    sites = Orders(num_rounds)
    models: list[Array] = [np.zeros((65, 10))]
    ends = {site: (site + 1.0, 0) for site in range(10)}  # when each is done, and the round that it trains
    fresh: dict[int, Array] = {}
    late: list[tuple[int, int, Array]] = []
    answered = dict.fromkeys(range(10), -1)
    while (number := len(models) - 1) < num_rounds:
        now = min(end for end, _ in ends.values())
        done = [site for site in sorted(ends) if ends[site][0] == now]
        for site in done:
            round = ends.pop(site)[1]
            answered[site] = round
            moved = sites.difference(models[round], site, round)
            if round == number:
                fresh[site] = moved
            else:
                late.append((site, round, moved))
        if len(fresh) >= 5:
            counted = [(site, number, moved) for site, moved in fresh.items()] + late
            weights = [len(sites.rows[site]) / np.sqrt(1 + number - round) for site, round, _ in counted]
            step = np.tensordot(np.array(weights) / sum(weights), np.array([moved for *_, moved in counted]), 1)
            models.append(models[-1] + step)
            fresh, late, number = {}, [], number + 1
        for site in range(10):
            if site not in ends and answered[site] < number:
                ends[site] = (now + site + 1, number)
    return models[-1]


def test_folding_comes_to_the_weights_of_a_naive_reference(prefect_api: str) -> None:
    outcome = BENCHMARK.run_job(BENCHMARK.RULES["fold"], seed=0, num_rounds=7, num_threads=2)
    assert outcome.virtual_time == 35.0
    assert outcome.num_late == sum(35 // units for units in range(6, 11))  # all that the slower half can do
    np.testing.assert_allclose(outcome.weight, folded(7).T, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARK.RULES)
def test_in_the_same_virtual_time_folding_is_worth_what_is_known_of_it(name: str, prefect_api: str) -> None:
    rule = BENCHMARK.RULES[name]
    outcomes = [
        BENCHMARK.run_job(rule, seed=seed, num_rounds=rule.num_rounds, num_threads=2)
        for seed in range(BENCHMARK.NUM_SEEDS)
    ]
    assert {outcome.virtual_time for outcome in outcomes} == {BENCHMARK.BUDGET}
    assert fmean(outcome.accuracy for outcome in outcomes) == pytest.approx(rule.known, abs=BENCHMARK.TOLERANCE)
