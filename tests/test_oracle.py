"""The oracle's rows: two rounds compared with a naive numpy reference, weight for weight; and, as
slow tests, the oracle's own figures.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

Array = np.ndarray[Any, np.dtype[np.float64]]
ROOT = Path(__file__).parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle_benchmark", ROOT / "benchmarks" / "oracle.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ORACLE = _load()
Combine = Callable[[Array, list[int]], Array]


class Reference:
    """Softmax regression over ten sites, drawn as the oracle draws them: seed 0, W is (65, 10)."""

    def __init__(self, alpha: float, epochs: int, num_hostile: int) -> None:
        features, labels = load_digits(return_X_y=True)
        self.x = np.hstack([features / 16, np.ones((len(features), 1))])[:1437]
        self.y = labels[:1437]
        self.epochs, self.num_hostile = epochs, num_hostile
        rng = np.random.default_rng(0)
        while True:
            parts: list[list[Any]] = [[] for _ in range(10)]
            for label in range(10):
                rows = np.where(self.y == label)[0]
                rng.shuffle(rows)
                shares = rng.dirichlet([alpha] * 10)
                for part, cut in zip(
                    parts, np.split(rows, (np.cumsum(shares) * len(rows)).astype(int)[:-1]), strict=True
                ):
                    part.append(cut)
            self.rows = [np.concatenate(part) for part in parts]
            if min(map(len, self.rows)) >= 10:
                break
        self.rng = np.random.default_rng(100)

    def trained(self, start: Array, site: int, correction: Array | float = 0.0) -> tuple[Array, int]:
        """A site's W after training, and the number of steps that it took."""
        w, steps, x, y = start.copy(), 0, self.x[self.rows[site]], self.y[self.rows[site]]
        for _ in range(self.epochs):
            order = self.rng.permutation(len(x))
            for at in range(0, len(x), 16):
                batch = order[at : at + 16]
                scores = x[batch] @ w
                odds = np.exp(scores - scores.max(axis=1, keepdims=True))
                error = odds / odds.sum(axis=1, keepdims=True) - np.eye(10)[y[batch]]
                w -= 0.1 * (x[batch].T @ error / len(batch) + correction)
                steps += 1
        if site < self.num_hostile:
            self.rng.normal(size=w.shape)
            w = start - 10 * (w - start)
        return w, steps

    def run(self, num_rounds: int, combine: Combine) -> Array:
        w = np.zeros((65, 10))
        for _ in range(num_rounds):
            found = np.array([self.trained(w, site)[0].ravel() for site in range(10)])
            w = combine(found, [len(rows) for rows in self.rows]).reshape(65, 10)
        return w

    def run_scaffold(self, num_rounds: int) -> Array:
        w, c, own = np.zeros((65, 10)), np.zeros((65, 10)), np.zeros((10, 65, 10))
        weights = np.array([len(rows) for rows in self.rows]) / 1437
        for _ in range(num_rounds):
            found, before = [], own.copy()
            for site in range(10):
                y, steps = self.trained(w, site, c - own[site])
                own[site] += (w - y) / (0.1 * steps) - c
                found.append(y)
            w = np.tensordot(weights, np.array(found), 1)
            c = c + (own - before).mean(axis=0)
        return w


def scores(models: Array, f: int) -> Array:
    distances = ((models[:, None] - models[None]) ** 2).sum(axis=-1)
    found: Array = np.sort(distances, axis=1)[:, 1 : 1 + max(1, len(models) - f - 2)].sum(axis=1)
    return found


def bulyan(models: Array, rows: list[int]) -> Array:
    left = list(range(10))
    chosen: list[int] = []
    while len(chosen) < 8:
        chosen.append(left.pop(int(np.argmin(scores(models[left], 1)))))
    picked = models[sorted(chosen)]
    near = np.argsort(np.abs(picked - np.median(picked, axis=0)), axis=0, kind="stable")[:6]
    found: Array = np.take_along_axis(picked, near, axis=0).mean(axis=0)
    return found


COMBINE: dict[str, Combine] = {
    "fedavg-0.1": lambda models, rows: np.average(models, axis=0, weights=rows),
    "hostile-krum": lambda models, rows: models[int(np.argmin(scores(models, 2)))],
    "hostile-bulyan": bulyan,
}


@pytest.mark.parametrize("name", [*COMBINE, "scaffold-20-epochs"])
def test_two_rounds_come_to_the_weights_of_a_naive_reference(name: str, prefect_api: str) -> None:
    case = ORACLE.CASES[name]
    reference = Reference(case.alpha, case.epochs, case.num_hostile)
    wanted = reference.run(2, COMBINE[name]) if name in COMBINE else reference.run_scaffold(2)
    found = ORACLE.run_job(case, seed=0, num_rounds=2, num_threads=2).model
    assert found.difference(ORACLE.Model.of(wanted.T)) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLE.CASES)
def test_fifty_rounds_come_to_the_oracles_weights(name: str, prefect_api: str) -> None:
    case = ORACLE.CASES[name]
    row = ORACLE.Row(case, [ORACLE.run_job(case, seed=0, num_rounds=50, num_threads=2)], judged=True)
    assert not row.failed, row.cells()
