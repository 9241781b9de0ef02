"""Every strategy against a naive ten-line reference, and its properties."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.flows.cyclic import Cyclic
from fedpool.flows.fedavg import FedAvg
from fedpool.flows.fednova import FedNova
from fedpool.flows.fedopt import FedOpt, FedOptRecipe
from fedpool.flows.scaffold import Scaffold
from fedpool.model import CONTROL, LOCAL_STEPS
from fedpool.tasks.aggregators import Mean
from fedpool.tasks.optimizers import Adaptive, Momentum, Schedule, ServerOptimizer, TorchOptimizer
from fedpool.tasks.strategy import State, Strategy, Update
from fedpool.tasks.used import job_shares
from tests.algorithms import FOLDER

Array = np.ndarray[Any, np.dtype[np.float64]]
ROUNDS, SITES, SIZE = 4, 3, 5


def drawn(seed: int) -> tuple[Array, Array, Array]:
    """An initial model (SIZE,), the sites' models (ROUNDS, SITES, SIZE) and their weights
    (ROUNDS, SITES).
    """
    rng = np.random.default_rng(seed)
    return rng.normal(size=SIZE), rng.normal(size=(ROUNDS, SITES, SIZE)), rng.uniform(0.1, 9, (ROUNDS, SITES))


def run(strategy: Strategy, start: Array, models: Array, weights: Array, **extra: Any) -> list[Array]:
    """The global model after each round."""
    state = strategy.init({"w": torch.from_numpy(start)})
    found: list[Array] = []
    known: dict[str, float] = {}
    for number, (round_models, round_weights) in enumerate(zip(models, weights, strict=True)):
        updates = [
            Update(
                f"site-{k}",
                float(round_weights[k]),
                {"w": torch.from_numpy(round_models[k].copy())},
                {
                    group: {"w": torch.from_numpy(values[number][k])}
                    for group, values in extra.get("extras", {}).items()
                },
                {name: float(values[number][k]) for name, values in extra.get("meta", {}).items()},
            )
            for k in range(len(round_models))
        ]
        now = {update.site: update.weight for update in updates}
        state = strategy.apply(replace(state, shares=job_shares(known, now, {})), updates)
        known = {**now, **known}
        assert state.round == number + 1
        found.append(state.params["w"].numpy())
    return found


def mean(models: Array, weights: Array) -> Array:
    found: Array = (weights[:, None] * models).sum(axis=0) / weights.sum()
    return found


LR, BETA1, BETA2, TAU = 0.1, 0.9, 0.99, 1e-3


def adaptive_reference(kind: str) -> Callable[[Array, Array, Array], list[Array]]:
    """Reddi et al. 2021, algorithm 2."""

    def reference(start: Array, models: Array, weights: Array) -> list[Array]:
        x, m, v, found = start, np.zeros(SIZE), np.full(SIZE, TAU**2), []
        for round_models, round_weights in zip(models, weights, strict=True):
            delta = mean(round_models, round_weights) - x
            m = BETA1 * m + (1 - BETA1) * delta
            if kind == "adagrad":
                v = v + delta**2
            elif kind == "yogi":
                v = v - (1 - BETA2) * delta**2 * np.sign(v - delta**2)
            else:
                v = BETA2 * v + (1 - BETA2) * delta**2
            x = x + LR * m / (np.sqrt(v) + TAU)
            found.append(x)
        return found

    return reference


def momentum_reference(nesterov: bool) -> Callable[[Array, Array, Array], list[Array]]:
    """Sutskever et al. 2013 as implemented in torch; DiLoCo's outer optimizer."""

    def reference(start: Array, models: Array, weights: Array) -> list[Array]:
        x, m, found = start, np.zeros(SIZE), []
        for round_models, round_weights in zip(models, weights, strict=True):
            delta = mean(round_models, round_weights) - x
            m = BETA1 * m + delta
            x = x + LR * (delta + BETA1 * m if nesterov else m)
            found.append(x)
        return found

    return reference


def average_reference(start: Array, models: Array, weights: Array) -> list[Array]:
    return [mean(m, w) for m, w in zip(models, weights, strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("strategy", "reference"),
    [
        (FedAvg(), average_reference),
        (Cyclic("fixed"), average_reference),
        *[
            (FedOpt(Mean(), Adaptive(kind, Schedule(LR), BETA1, BETA2, TAU)), adaptive_reference(kind))
            for kind in ("adam", "yogi", "adagrad")
        ],
        (FedOpt(Mean(), Momentum(Schedule(LR), BETA1)), momentum_reference(False)),
        (FedOpt(Mean(), Momentum(Schedule(LR), BETA1, nesterov=True)), momentum_reference(True)),
        (
            FedOpt(Mean(), TorchOptimizer("SGD", Schedule(LR), {"momentum": BETA1, "nesterov": True})),
            momentum_reference(True),
        ),
    ],
    ids=["fedavg", "cyclic", "fedadam", "fedyogi", "fedadagrad", "momentum", "diloco", "torch-nesterov"],
)
def test_it_does_what_a_naive_reference_does(
    strategy: Strategy, reference: Callable[[Array, Array, Array], list[Array]], seed: int
) -> None:
    np.testing.assert_allclose(run(strategy, *drawn(seed)), reference(*drawn(seed)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_fednova_does_what_a_naive_reference_does(seed: int) -> None:
    """Wang et al. 2020, equation 6, with plain local SGD."""
    start, models, weights = drawn(seed)
    steps = np.random.default_rng(seed).integers(1, 50, (ROUNDS, SITES)).astype(float)
    x, wanted = start, []
    for number in range(ROUNDS):
        p = weights[number] / weights[number].sum()
        effective = (p * steps[number]).sum()
        x = x + effective * sum(p[k] * (models[number][k] - x) / steps[number][k] for k in range(SITES))
        wanted.append(x)
    found = run(FedNova(), start, models, weights, meta={LOCAL_STEPS: steps})
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_fednova_with_equal_steps_is_federated_averaging_to_the_bit() -> None:
    start, models, weights = drawn(0)
    found = run(FedNova(), start, models, weights, meta={LOCAL_STEPS: np.full((ROUNDS, SITES), 7.0)})
    assert np.array_equal(found, run(FedAvg(), start, models, weights))


@pytest.mark.parametrize("lr", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_scaffold_does_what_a_naive_reference_does(seed: int, lr: float) -> None:
    """Karimireddy et al. 2020, algorithm 1, lines 16 and 17, with 3 of 6 sites in a round."""
    start, models, weights = drawn(seed)
    changes = np.random.default_rng(seed).normal(size=(ROUNDS, SITES, SIZE))
    x, c, wanted = start, np.zeros(SIZE), []
    strategy = Scaffold(num_sites=6, lr=lr)
    for number in range(ROUNDS):
        x = x + lr * (mean(models[number], weights[number]) - x)
        wanted.append(x)
    np.testing.assert_allclose(
        run(strategy, start, models, weights, extras={CONTROL: changes}), wanted, rtol=1e-9, atol=1e-9
    )
    state = strategy.init({"w": torch.from_numpy(start)})
    for number in range(ROUNDS):
        updates = [
            Update(
                f"s{k}",
                1.0,
                {"w": torch.zeros(SIZE, dtype=torch.float64)},
                {CONTROL: {"w": torch.from_numpy(changes[number][k])}},
            )
            for k in range(SITES)
        ]
        alike = {update.site: 1.0 for update in updates}
        state = strategy.apply(replace(state, shares=job_shares(alike if number else {}, alike, {})), updates)
        c = c + changes[number].sum(axis=0) / 6
    np.testing.assert_allclose(state.slots[CONTROL]["w"].numpy(), c, rtol=1e-9, atol=1e-9)


def every_strategy() -> Mapping[str, Strategy]:
    schedule = Schedule(0.1)
    return {
        "fedavg": FedAvg(),
        "fednova": FedNova(),
        "scaffold": Scaffold(5),
        "cyclic": Cyclic("fixed"),
        "fedadam": FedOpt(Mean(), Adaptive("adam", schedule, 0.9, 0.99, 1e-3)),
        "adamw": FedOpt(Mean(), TorchOptimizer("AdamW", schedule, {"weight_decay": 0.1})),
    }


@pytest.mark.parametrize("name", every_strategy())
def test_what_is_no_floating_point_number_is_averaged_and_has_no_slot(name: str) -> None:
    strategy = every_strategy()[name]
    averaged = frozenset({"n"})
    state = strategy.init({"n": torch.zeros(1, dtype=torch.float64)}, averaged)
    assert state.averaged == averaged
    updates = [
        Update("a", 1.0, {"n": torch.tensor([2.0], dtype=torch.float64)}, {}, {LOCAL_STEPS: 1}),
        Update("b", 3.0, {"n": torch.tensor([6.0], dtype=torch.float64)}, {}, {LOCAL_STEPS: 9}),
    ]
    after = strategy.apply(state, updates)
    assert after.params["n"].tolist() == [5.0]
    assert all("n" not in values for values in after.slots.values())


@pytest.mark.parametrize("name", every_strategy())
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_same_inputs_give_the_same_bits_and_are_left_as_they_were(name: str, data: st.DataObject) -> None:
    strategy = every_strategy()[name]
    value = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3)
    start = torch.tensor(data.draw(value), dtype=torch.float64)
    models = [torch.tensor(data.draw(value), dtype=torch.float64) for _ in range(3)]
    updates = [
        Update(f"s{k}", k + 1.0, {"w": models[k]}, {CONTROL: {"w": models[k]}}, {LOCAL_STEPS: k + 1}) for k in range(3)
    ]
    before = [model.clone() for model in models]
    found = []
    for _ in range(2):
        shares = job_shares({}, {update.site: update.weight for update in updates}, {})
        state: State = replace(strategy.init({"w": start}), shares=shares)
        for _ in range(3):
            state = strategy.apply(state, updates)
        found.append([state.params["w"].clone(), *(slot["w"].clone() for slot in state.slots.values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(before, models, strict=True))


@pytest.mark.parametrize("name", every_strategy())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), power=st.integers(-1000, 1020))
def test_a_power_of_two_times_all_weights_changes_no_bit(name: str, seed: int, power: int) -> None:
    start, models, weights = drawn(seed)
    extra = {"extras": {CONTROL: models}, "meta": {LOCAL_STEPS: np.abs(models[:, :, 0]) + 1}}
    found, scaled = (
        run(every_strategy()[name], start, models, scale * weights, **extra) for scale in (1.0, 2.0**power)
    )
    assert np.array_equal(found, scaled)


@pytest.mark.parametrize("name", every_strategy())
@pytest.mark.parametrize("seed", range(20))
def test_weights_relative_to_the_heaviest_come_to_the_same_bits(name: str, seed: int) -> None:
    """Strategies were given relative weights before they were given absolute ones."""
    start, models, weights = drawn(seed)
    extra = {"extras": {CONTROL: models}, "meta": {LOCAL_STEPS: np.abs(models[:, :, 0]) + 1}}
    found, relative = (
        run(every_strategy()[name], start, models, given, **extra)
        for given in (weights, weights / weights.max(axis=1, keepdims=True))
    )
    assert np.array_equal(found, relative)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [("fixed", ["a", "b", "c", "a"]), (("c", "a"), ["c", "a", "c", "a"]), (("b", "gone", "a"), ["b", "a", "b", "a"])],
)
def test_cyclic_goes_from_site_to_site(order: str | tuple[str, ...], wanted: Sequence[str]) -> None:
    strategy = Cyclic(order)
    turns = [strategy.choose(seed=0, round=r, sites=("a", "b", "c"), count=None) for r in range(4)]
    assert turns == [(site,) for site in wanted]
    assert strategy.choose(seed=0, round=0, sites=(), count=None) == ()


def test_cyclic_in_random_order_visits_every_site_once_a_cycle_as_the_seed_says() -> None:
    strategy, sites = Cyclic("random"), [f"site-{k}" for k in range(6)]

    def cycle(seed: int, number: int) -> list[str]:
        turns = [strategy.choose(seed=seed, round=6 * number + k, sites=sites, count=None) for k in range(6)]
        return [site for (site,) in turns]

    assert sorted(cycle(0, 0)) == sorted(cycle(0, 1)) == sites
    assert cycle(0, 0) != cycle(0, 1) and cycle(0, 0) != cycle(1, 0)
    assert cycle(3, 2) == cycle(3, 2)


def of_the_paper(optimizer: str, **fields: Any) -> ServerOptimizer:
    recipe = FedOptRecipe(
        name="x",
        min_clients=1,
        num_rounds=1,
        model={"w": np.zeros(2)},
        train_script=str(FOLDER / "plain.py"),
        server_optimizer=optimizer,
        **fields,
    )
    return recipe.strategy(1).optimizer


def test_server_optimizers_have_the_defaults_of_their_papers() -> None:
    """Reddi et al. 2021, section 5 and appendix D; Hsu et al. 2019, section 4.3."""
    assert of_the_paper("adagrad") == Adaptive("adagrad", Schedule(0.1), 0.0, 0.99, 1e-3)
    assert of_the_paper("adam") == Adaptive("adam", Schedule(0.1), 0.9, 0.99, 1e-3)
    assert of_the_paper("yogi") == Adaptive("yogi", Schedule(0.1), 0.9, 0.99, 1e-3)
    assert of_the_paper("momentum") == Momentum(Schedule(1.0), 0.9)
    assert of_the_paper("nesterov") == Momentum(Schedule(1.0), 0.9, nesterov=True)
    assert of_the_paper("adagrad", beta1=0.9, server_lr=0.2) == Adaptive("adagrad", Schedule(0.2), 0.9, 0.99, 1e-3)


def test_without_momentum_fedadagrad_steps_by_this_rounds_difference_alone() -> None:
    start, models, weights = drawn(0)
    x, v, wanted = start, np.full(SIZE, TAU**2), []
    for round_models, round_weights in zip(models, weights, strict=True):
        delta = mean(round_models, round_weights) - x
        v = v + delta**2
        x = x + LR * delta / (np.sqrt(v) + TAU)
        wanted.append(x)
    strategy = FedOpt(Mean(), of_the_paper("adagrad"))
    np.testing.assert_allclose(run(strategy, start, models, weights), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_scaffolds_variate_is_the_weighted_mean_of_the_sites_whoever_takes_part(seed: int) -> None:
    """Twelve rounds of 3 of 6 sites with unequal weights: c = sum_k w_k c_k / sum_k w_k once every
    site has taken part.
    """
    rng = np.random.default_rng(seed)
    weights = {f"s{k}": float(w) for k, w in enumerate(rng.uniform(1, 9, 6))} | {"s5": 0.0}
    own = {site: np.zeros(SIZE) for site in weights}
    strategy, known = Scaffold(num_sites=6), dict[str, float]()
    state = strategy.init({"w": torch.zeros(SIZE, dtype=torch.float64)})
    for _ in range(12):
        sites = sorted(rng.choice(sorted(weights), 3, replace=False))
        changes, scales = rng.normal(size=(3, SIZE)), rng.choice([1.0, 0.25], 3)
        now = {site: weights[site] for site in sites}
        updates = [
            Update(
                site,
                weights[site],
                {"w": torch.zeros(SIZE, dtype=torch.float64)},
                {CONTROL: {"w": torch.from_numpy(change)}},
                scale=float(scale),
            )
            for site, change, scale in zip(sites, changes, scales, strict=True)
            if weights[site]
        ]
        state = strategy.apply(replace(state, shares=job_shares(known, now, {})), updates)
        known = {**now, **known}
        for site, change, scale in zip(sites, changes, scales, strict=True):
            own[site] += scale * change * (weights[site] > 0)
    assert len(known) == 6
    wanted = sum(weights[site] * own[site] for site in weights) / sum(weights.values())
    np.testing.assert_allclose(state.slots[CONTROL]["w"].numpy(), wanted, rtol=0, atol=1e-12)


def test_of_weights_that_say_so_scaffold_weighs_nothing() -> None:
    start, models, weights = drawn(1)
    changes = np.random.default_rng(1).normal(size=(ROUNDS, SITES, SIZE))
    alike = run(Scaffold(6), start, models, np.ones_like(weights), extras={CONTROL: changes})
    papers = run(Scaffold(6, weighted=False), start, models, weights, extras={CONTROL: changes})
    np.testing.assert_allclose(papers, alike, rtol=1e-12)
    assert not np.allclose(run(Scaffold(6), start, models, weights, extras={CONTROL: changes}), alike)
