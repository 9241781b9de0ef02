"""Infinities that a model holds by design pass the gate if unchanged, are kept to the bit, and
count in no mean or norm.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.arrays import load_arrays, save_and_hash
from fedpool.flows.fedavg import FedAvg
from fedpool.flows.fedopt import FedOpt
from fedpool.inspection import inspect_tensors
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery
from fedpool.store import Store
from fedpool.tasks.aggregate import Before, aggregate
from fedpool.tasks.aggregators import GeometricMedian, Krum, Mean, Median
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Rejected, judge
from fedpool.tasks.optimizers import Adaptive, Momentum, Schedule
from fedpool.tasks.strategy import Strategy
from tests.updates import sent_by

PATHS = JobPaths("job-1")
INF = math.inf
MASK = [0.0, -INF, -INF, 0.0]
BASE = {"w": torch.tensor([1.0, 2.0]), "mask": torch.tensor(MASK), "best": torch.tensor([INF, INF])}
HOLES = frozenset({"mask", "best"})


class Round:
    """A round in a local store, with blocks of a few elements."""

    def __init__(self, folder: Path, base: Mapping[str, Any] = BASE, *, trusted: bool = True) -> None:
        self.store = Store(folder)
        self.store.block_elements = 3
        self.trusted = trusted
        with self.store.staged(PATHS.global_model(0)) as file:
            self.digest = save_and_hash(file, base)
        self.base = self.store.tensors(PATHS.global_model(0), self.digest.size)
        self.updates: list[Accepted] = []

    def judge(
        self, site: str, params: Mapping[str, Any], params_type: str = "FULL", weight: float = 1.0, **rules: Any
    ) -> Accepted | Rejected:
        with self.store.staged(PATHS.update(0, site)) as file:
            digest = save_and_hash(file, params)
        manifest = sent_by(
            site,
            base_sha256=self.digest.sha256,
            params_type=params_type,
            sha256=digest.sha256,
            size=digest.size,
            weight=weight,
        )
        wanted = Expected(
            "job-1", 0, "train", self.digest.sha256, self.base.spec, "FULL", self.base, **{"holes": HOLES} | rules
        )
        tensors = self.store.tensors(PATHS.update(0, site), digest.size)
        seen = inspect_tensors(tensors, self.store.block_elements) if self.trusted else None
        outcome = judge(self.store, site, 0, Delivery(manifest, "m" * 64, seen), wanted)
        if isinstance(outcome, Accepted):
            self.updates.append(outcome)
        return outcome

    def send(self, site: str, params_type: str = "FULL", weight: float = 1.0, **changes: Any) -> Accepted:
        outcome = self.judge(site, BASE | changes, params_type, weight)
        assert isinstance(outcome, Accepted), outcome
        return outcome

    def result(self, strategy: Strategy | None = None) -> dict[str, Any]:
        aggregate(
            strategy or FedAvg(Mean()),
            store=self.store,
            before=Before(self.base, holes=HOLES),
            updates=self.updates,
            factors={},
            target=PATHS.global_model(1),
            state_target=PATHS.state(0),
        )
        return load_arrays(self.store.full(PATHS.global_model(1)), "torch")


@pytest.mark.parametrize("trusted", [True, False])
def test_an_unchanged_mask_passes_and_is_kept_to_the_bit(trusted: bool, tmp_path: Path) -> None:
    round = Round(tmp_path, trusted=trusted)
    round.send("a", w=torch.tensor([3.0, 4.0]))
    round.send("b", weight=3.0, w=torch.tensor([7.0, 8.0]))
    result = round.result()
    assert result["w"].tolist() == [6.0, 7.0]
    assert result["mask"].tolist() == MASK and result["best"].tolist() == [INF, INF]


@pytest.mark.parametrize("nothing", [math.nan, 0.0])
def test_as_a_difference_no_change_is_nan_or_nothing(nothing: float, tmp_path: Path) -> None:
    round = Round(tmp_path)
    difference = {"mask": torch.tensor([0.0, nothing, nothing, 0.0]), "best": torch.tensor([nothing, nothing])}
    round.send("a", "DIFF", 1.0, w=torch.tensor([2.0, 2.0]), **difference)
    round.send("b", w=torch.tensor([5.0, 6.0]))
    result = round.result()
    assert result["w"].tolist() == [4.0, 5.0]
    assert result["mask"].tolist() == MASK and result["best"].tolist() == [INF, INF]


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(Median()),
        FedAvg(GeometricMedian()),
        FedAvg(Krum(num_byzantine=1)),
        FedOpt(Mean(), Adaptive("adam", Schedule(0.1), 0.9, 0.99, 0.001)),
        FedOpt(Mean(), Momentum(Schedule(1.0), 0.9)),
    ],
    ids=["median", "geometric median", "krum", "adam", "momentum"],
)
def test_every_strategy_keeps_it(strategy: Strategy, tmp_path: Path) -> None:
    round = Round(tmp_path)
    for number, site in enumerate("abcde"):
        round.send(site, w=torch.tensor([float(number), 1.0]))
    result = round.result(strategy)
    assert result["mask"].tolist() == MASK and bool(result["w"].isfinite().all())
    assert result["best"].tolist() == [INF, INF]


def test_what_fills_a_hole_is_limited_as_any_difference_is(tmp_path: Path) -> None:
    round = Round(tmp_path)
    filled = BASE | {"best": torch.tensor([30.0, -40.0])}
    outcome = round.judge("a", filled, max_norm=49.0)
    assert isinstance(outcome, Rejected) and outcome.code == "norm" and "L2 norm 50, " in outcome.reason
    within = round.judge("b", BASE | {"best": torch.tensor([30.0, INF]), "w": torch.tensor([1.0, 42.0])}, max_norm=50.0)
    assert isinstance(within, Accepted) and within.norm == 50.0
    clipped = Round(tmp_path / "clipped")
    for site in "ab":
        outcome = clipped.judge(site, filled, max_norm=5.0, clip=True)
        assert isinstance(outcome, Accepted) and (outcome.norm, outcome.scale) == (50.0, 0.1)
    assert clipped.result()["best"].tolist() == [3.0, -4.0]


def test_what_the_sites_make_finite_is_their_mean_and_what_one_of_them_leaves_stays(tmp_path: Path) -> None:
    round = Round(tmp_path)
    round.send("a", best=torch.tensor([1.0, 5.0]))
    round.send("b", best=torch.tensor([3.0, INF]))
    round.send("without-data", weight=0.0)
    assert round.result()["best"].tolist() == [2.0, INF]


@pytest.mark.parametrize(
    ("changes", "params_type"),
    [
        ({"w": torch.tensor([-INF, 1.0])}, "FULL"),  # where no infinity is allowed
        ({"mask": torch.tensor([0.0, -INF, INF, 0.0])}, "FULL"),  # infinity of the opposite sign
        ({"mask": torch.tensor([0.0, -INF, math.nan, 0.0])}, "FULL"),
        ({"mask": torch.tensor([-INF, -INF, -INF, 0.0])}, "FULL"),  # one hole too many
        ({"mask": torch.tensor([0.0, 0.0, -INF, 0.0]), "best": torch.tensor([0.0, math.nan])}, "DIFF"),
        ({"mask": torch.tensor([math.nan, 0.0, 0.0, 0.0]), "best": torch.zeros(2)}, "DIFF"),
        ({"w": torch.tensor([math.nan, 1.0]), "mask": torch.zeros(4), "best": torch.zeros(2)}, "DIFF"),
    ],
)
def test_any_other_value_that_is_not_finite_is_rejected_with_the_remedy(
    changes: dict[str, Any], params_type: str, tmp_path: Path
) -> None:
    outcome = Round(tmp_path).judge("a", BASE | changes, params_type)
    assert isinstance(outcome, Rejected) and outcome.code == "not_finite" and "exclude_vars" in outcome.reason


def test_in_a_job_of_an_earlier_version_everything_must_be_finite_in_its_words(tmp_path: Path) -> None:
    outcome = Round(tmp_path).judge("a", BASE, holes=None)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "best holds NaN or infinity, first among its elements 0 to 1"


@pytest.mark.parametrize("params_type", ["FULL", "DIFF"])
def test_holes_are_part_of_no_norm(params_type: str, tmp_path: Path) -> None:
    round = Round(tmp_path)
    update = {"w": torch.tensor([4.0, 6.0])}
    if params_type == "DIFF":
        update = {
            "w": torch.tensor([3.0, 4.0]),
            "mask": torch.tensor([0.0, math.nan, 0.0, 0.0]),
            "best": torch.zeros(2),
        }
    outcome = round.judge("a", BASE | update, params_type, max_norm=2.5, clip=True)
    assert isinstance(outcome, Accepted)
    assert outcome.norm == 5.0 and outcome.scale == 0.5
    result = round.result()
    assert result["w"].tolist() == [2.5, 4.0] and result["mask"].tolist() == MASK


VALUES = st.sampled_from([0.0, 1.5, -1e30, INF, -INF, math.nan])


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=4, max_size=4), st.sampled_from(["FULL", "DIFF"]))
def test_whatever_a_site_sends_the_next_model_has_no_holes_but_those_of_the_last(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], params_type: str
) -> None:
    round = Round(tmp_path_factory.mktemp("round"))
    sent = {"w": torch.zeros(2), "mask": torch.tensor(values), "best": torch.zeros(2)}
    outcome = round.judge("hostile", sent, params_type)
    round.send("good")
    result = round.result()["mask"]
    at = ~result.isfinite()
    assert bool((result[at] == torch.tensor(MASK)[at]).all()), "what is not finite was so before, and is the same"
    if params_type == "FULL":
        fits = all(math.isfinite(value) or value == before for value, before in zip(values, MASK, strict=True))
        assert isinstance(outcome, Accepted) is fits


def test_numpys_arrays_have_holes_as_torchs_do(tmp_path: Path) -> None:
    round = Round(tmp_path, {name: value.numpy() for name, value in BASE.items()})
    round.judge("a", {name: np.asarray(value) for name, value in BASE.items()})
    assert round.result()["mask"].tolist() == MASK
