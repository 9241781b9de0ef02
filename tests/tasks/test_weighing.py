"""The update weights that a strategy is given are absolute, so one answer can stand for a group of
sites.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpool.arrays import save_and_hash
from fedpool.filters import ComputedTensors
from fedpool.flows.fedavg import FedAvg
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.aggregate import Before, aggregate
from fedpool.tasks.arithmetic import BEFORE, CURRENT, Arithmetic
from fedpool.tasks.gate import Accepted
from fedpool.tasks.geometry import Geometry
from fedpool.tasks.staleness import Origin, discount
from fedpool.tasks.strategy import State, Update, relative_weights
from fedpool.tasks.used import counting
from fedpool.tasks.weighing import with_weights
from fedpool.tensors import Tensors
from tests.updates import sent_by

PATHS = JobPaths("job-1")
NO_TENSORS = ComputedTensors({}, lambda name, start, stop: bytearray())
LIGHTEST_NORMAL, LIGHTEST, HEAVIEST = 2.0**-1022, 2.0**-1074, 2.0**1023


def accepted(site: str, weight: float, *, staleness: int = 0, tensors: Tensors = NO_TENSORS) -> Accepted:
    """An update that passed the gate."""
    origin = Origin(tensors, staleness) if staleness else None
    return Accepted(sent_by(site, weight=weight), "m" * 64, weight, tensors, origin=origin)


def weights(
    said: Mapping[str, float], factors: Mapping[str, float] | None = None, arithmetic: Arithmetic = CURRENT
) -> dict[str, float]:
    """site -> weight, for the sites that count."""
    counted = with_weights([accepted(site, weight) for site, weight in said.items()], factors or {}, arithmetic)
    return {update.site: weight for update, weight in counted}


SEEN = {"site-1": 3.0, "site-2": 10.0, "site-3@3": 3.5, "site-4": 1.5, "site-4@1": 2 * discount(1) * 0.25}


class Seeing(FedAvg):
    """Checks what a strategy is given, before the first slice and for each slice."""

    surveys = True

    def survey(self, geometry: Geometry) -> "Seeing":
        assert dict(zip(geometry.sites, geometry.weights, strict=True)) == SEEN
        return self

    def apply(self, state: State, updates: Sequence[Update]) -> State:
        assert {update.key: update.weight for update in updates} == SEEN
        return state.after({name: values + 1 for name, values in state.params.items()})


def test_a_strategy_sees_what_a_site_says_times_its_factor_and_the_discount_of_a_late_update(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.staged(PATHS.global_model(0)) as file:
        digest = save_and_hash(file, {"w": np.zeros(2)})
    model = store.tensors(PATHS.global_model(0), digest.size)
    aggregate(
        Seeing(),
        store=store,
        before=Before(model),
        updates=[
            accepted("site-1", 3, tensors=model),
            accepted("site-2", 5, tensors=model),
            accepted("site-3", 7, staleness=3, tensors=model),
            accepted("site-4", 6, tensors=model),
            accepted("site-4", 2, staleness=1, tensors=model),
            accepted("site-5", 0, tensors=model),
        ],
        factors={"site-2": 2.0, "site-4": 0.25},
        target=PATHS.global_model(1),
        state_target=PATHS.state(0),
    )
    after = store.tensors(PATHS.global_model(1), digest.size)
    assert np.frombuffer(after.read_block("w", 0, 2)).tolist() == [1.0, 1.0]


def mean_of(updates: Sequence[Update]) -> torch.Tensor:
    state = State({"w": torch.zeros(2, dtype=torch.float64)})
    return FedAvg().apply(state, updates).params["w"]


def as_seen(
    accepted: Sequence[Accepted], models: Mapping[str, torch.Tensor], factors: Mapping[str, float]
) -> list[Update]:
    """What a strategy is given in a round with these updates."""
    counted = with_weights(accepted, factors, CURRENT)
    return [Update(one.site, weight, {"w": models[one.site]}, staleness=one.staleness) for one, weight in counted]


values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2)
sites = st.tuples(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0, 3.5]), st.integers(0, 4), values)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(sites, min_size=1, max_size=6), min_size=2, max_size=4))
def test_regions_that_answer_as_one_site_each_come_to_the_mean_of_all_sites(
    regions: list[list[tuple[int, float, int, list[float]]]],
) -> None:
    rounds: list[list[Accepted]] = []
    models, factors = dict[str, torch.Tensor](), dict[str, float]()
    for number, region in enumerate(regions):
        rounds.append([])
        for index, (steps, factor, staleness, params) in enumerate(region):
            site = f"site-{number}-{index}"
            models[site], factors[site] = torch.tensor(params, dtype=torch.float64), factor
            rounds[-1].append(accepted(site, steps, staleness=staleness))
    everyone = as_seen([one for each in rounds for one in each], models, factors)
    assume(everyone)
    answers = []
    for number, each in enumerate(rounds):
        if updates := as_seen(each, models, factors):  # a region's own round has only its own sites
            total = sum(update.weight for update in updates)
            answers.append(Update(f"region-{number}", total, {"w": mean_of(updates)}))
    largest = max(float(model.abs().max()) for model in models.values())
    np.testing.assert_allclose(mean_of(answers), mean_of(everyone), rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("heaviest", [1.0, 1e308])
def test_in_a_job_of_an_earlier_version_they_are_relative_to_the_heaviest(heaviest: float) -> None:
    said = {"a": heaviest, "b": heaviest / 4, "c": 0.0}
    for arithmetic in (BEFORE, Arithmetic(2)):
        assert weights(said, {"a": 2.0}, arithmetic) == {"a": 1.0, "b": 0.125}


@pytest.mark.parametrize(
    ("said", "factors", "wanted"),
    [
        ({"a": 1e300, "b": 1.0}, {"a": 1e9}, {"a": HEAVIEST, "b": 1e-309 * HEAVIEST}),
        ({"a": 1e308, "b": 1e308, "c": 0.0}, {"a": 16.0, "b": 64.0}, {"a": HEAVIEST / 4, "b": HEAVIEST}),
        ({"a": 1e-300, "b": 1e-300}, {"a": 2.0**-100, "b": 2.0**-99}, {"a": LIGHTEST_NORMAL / 2, "b": LIGHTEST_NORMAL}),
        ({"a": LIGHTEST, "b": LIGHTEST}, {}, {"a": LIGHTEST_NORMAL, "b": LIGHTEST_NORMAL}),
        ({"a": 1e-200, "b": 1e-124}, {"b": 1e-200}, {"a": 1e-200, "b": LIGHTEST}),
    ],
    ids=["one is too heavy", "all are too heavy", "too light", "hardly a number", "the lighter one is too light"],
)
def test_where_a_double_cannot_hold_them_their_ratios_are_kept(
    said: dict[str, float], factors: dict[str, float], wanted: dict[str, float]
) -> None:
    found = weights(said, factors)
    assert found == {site: pytest.approx(weight, rel=1e-12) for site, weight in wanted.items()}


finite = st.floats(0, allow_infinity=False, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(finite, min_size=1, max_size=6))
def test_relative_to_the_heaviest_they_are_to_the_bit_what_decides_who_counts(said: list[float]) -> None:
    named = {f"site-{number}": weight for number, weight in enumerate(said)}
    found = weights(named)
    shares = {site: share for site, share in counting(named, {}).items() if share}
    assert found.keys() == shares.keys() and all(weight > 0 for weight in found.values())
    if max(said) >= LIGHTEST_NORMAL:
        assert found == {site: named[site] for site in shares}
        assert relative_weights([Update(site, weight, {}) for site, weight in found.items()]) == list(shares.values())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(finite, st.floats(1e-6, 1e6)), min_size=1, max_size=6))
def test_whatever_the_factors_their_ratios_are_those_that_decide_who_counts(drawn: list[tuple[float, float]]) -> None:
    said = {f"site-{number}": weight for number, (weight, _) in enumerate(drawn)}
    factors = {f"site-{number}": factor for number, (_, factor) in enumerate(drawn)}
    found = weights(said, factors)
    shares = {site: share for site, share in counting(said, factors).items() if share}
    assert found.keys() == shares.keys()
    ratios = relative_weights([Update(site, weight, {}) for site, weight in found.items()])
    np.testing.assert_allclose(ratios, list(shares.values()), rtol=1e-12, atol=1e-12)


def test_without_updates_there_are_no_weights() -> None:
    assert with_weights([], {}, CURRENT) == [] and relative_weights([]) == []
