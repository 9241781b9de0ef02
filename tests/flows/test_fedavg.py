"""Federated averaging: its properties, a naive reference, and the oracle's small exact cases."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.arrays import load_arrays, save_and_hash
from fedpool.flows.fedavg import FedAvg
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.aggregate import Before, aggregate
from fedpool.tasks.gate import Accepted
from fedpool.tasks.strategy import Update
from tests.updates import sent_by

# Never -0.0: adding 0.0 to it gives 0.0, which is equal but has different bits.
numbers = st.floats(-1e6, 1e6).map(lambda value: value + 0.0)
weights = st.floats(1e-6, 1e6)
Sites = list[tuple[float, list[float]]]
sites: st.SearchStrategy[Sites] = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.tuples(weights, st.lists(numbers, min_size=size, max_size=size)), min_size=1, max_size=6)
)


def apply(updates: Sequence[tuple[float, Sequence[float]]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The next model from FedAvg, given the sites' models in order."""
    strategy = FedAvg()
    state = strategy.init({"w": torch.zeros(len(updates[0][1]), dtype=torch.float64)})
    after = strategy.apply(
        state,
        [
            Update(f"site-{n:03d}", weight, {"w": torch.tensor(value, dtype=torch.float64)})
            for n, (weight, value) in enumerate(updates)
        ],
    )
    found: np.ndarray[Any, np.dtype[np.float64]] = after.params["w"].numpy()
    return found


def aggregated(
    updates: Sequence[tuple[str, float, Mapping[str, Any]]], base: Mapping[str, Any], folder: Path | None = None
) -> tuple[dict[str, Any], bytes]:
    """Aggregate updates in the given order through the store: the next model and its bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        store, paths = Store(root), JobPaths("job")
        with store.staged(paths.global_model(0)) as file:
            size = save_and_hash(file, base).size
        accepted = []
        for site, weight, params in updates:
            with store.staged(paths.update(0, site)) as file:
                digest = save_and_hash(file, params)
            manifest = sent_by(site, weight=weight)
            accepted.append(Accepted(manifest, "m" * 64, weight, store.tensors(paths.update(0, site), digest.size)))
        target = paths.global_model(1)
        aggregate(
            FedAvg(),
            store=store,
            before=Before(store.tensors(paths.global_model(0), size)),
            updates=accepted,
            factors={},
            target=target,
            state_target=paths.state(0),
        )
        data = Path(store.full(target)).read_bytes()
        return load_arrays(store.full(target), "numpy"), data


def bits(values: Sequence[float] | np.ndarray[Any, Any]) -> bytes:
    return np.asarray(values, dtype=np.float64).tobytes()


@settings(max_examples=60)
@given(sites, st.floats(1e-6, 1e6))
def test_weights_are_relative(updates: Sites, factor: float) -> None:
    scaled = apply([(weight * factor, value) for weight, value in updates])
    np.testing.assert_allclose(scaled, apply(updates), rtol=1e-9, atol=1e-6)


@settings(max_examples=60)
@given(weights, st.lists(numbers, min_size=1, max_size=4))
def test_one_site_with_any_weight_gives_that_sites_model_to_the_bit(weight: float, value: list[float]) -> None:
    assert bits(apply([(weight, value)])) == bits(value)


@settings(max_examples=60)
@given(st.lists(weights, min_size=1, max_size=8), st.lists(numbers, min_size=1, max_size=4))
def test_equal_updates_give_that_update_to_the_bit(each: list[float], value: list[float]) -> None:
    assert bits(apply([(weight, value) for weight in each])) == bits(value)


@settings(max_examples=60)
@given(sites, st.data(), st.floats(0.01, 0.99))
def test_splitting_a_site_in_two_changes_nothing(updates: Sites, data: st.DataObject, part: float) -> None:
    at = data.draw(st.integers(0, len(updates) - 1))
    weight, value = updates[at]
    split = [*updates[:at], (weight * part, value), (weight * (1 - part), value), *updates[at + 1 :]]
    largest = max(1.0, *(abs(number) for _, numbers in updates for number in numbers))
    np.testing.assert_allclose(apply(split), apply(updates), rtol=0, atol=1e-12 * largest)


@settings(max_examples=60)
@given(sites)
def test_it_is_the_mean_of_a_naive_reference(updates: Sites) -> None:
    expected = sum(weight * np.array(value) for weight, value in updates) / sum(weight for weight, _ in updates)
    np.testing.assert_allclose(apply(updates), expected, rtol=1e-6, atol=1e-6)


def test_updates_of_weight_0_count_for_nothing() -> None:
    assert apply([(0.0, [9.0]), (2.0, [3.0])]).tolist() == [3.0]


def test_the_state_before_and_the_updates_are_left_as_they_were() -> None:
    strategy = FedAvg()
    before, update = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    state = strategy.init({"w": before})
    strategy.apply(state, [Update("site-1", 1.0, {"w": update}), Update("site-2", 1.0, {"w": update * 3})])
    assert (before.tolist(), update.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert state.params["w"] is before


@settings(max_examples=25, deadline=None)
@given(sites, st.randoms())
def test_a_permutation_of_the_arrival_order_changes_no_bit(updates: Sites, random: Any) -> None:
    size = len(updates[0][1])
    arrived: list[tuple[str, float, Mapping[str, Any]]] = [
        (f"site-{number}", weight, {"w": np.array(value, dtype=np.float32)})
        for number, (weight, value) in enumerate(updates)
    ]
    base = {"w": np.zeros(size, dtype=np.float32)}
    _, first = aggregated(arrived, base)
    random.shuffle(arrived)
    _, second = aggregated(arrived, base)
    assert first == second


@settings(max_examples=25, deadline=None)
@given(sites)
def test_through_the_store_it_is_the_mean_of_a_naive_reference_too(updates: Sites) -> None:
    arrays = [np.array(value, dtype=np.float32) for _, value in updates]
    found, _ = aggregated(
        [(f"site-{n}", weight, {"w": arrays[n]}) for n, (weight, _) in enumerate(updates)],
        {"w": np.zeros_like(arrays[0])},
    )
    expected = sum(w * a.astype(np.float64) for (w, _), a in zip(updates, arrays, strict=True)) / sum(
        w for w, _ in updates
    )
    largest = max(1.0, *(float(np.abs(array).max()) for array in arrays))
    assert found["w"].dtype == np.float32
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6, atol=1e-6 * largest)


EXACT = [
    pytest.param([(1, [2, 4, 6]), (2, [3, 6, 9])], [8 / 3, 16 / 3, 8], id="weights 1 and 2"),
    pytest.param([(1, [number]) for number in range(10)], [4.5], id="0 to 9 from ten equal sites"),
    pytest.param([(1, [2]), (3, [6])], [5.0], id="weights 1 to 3"),
    pytest.param([(1, [2, 4]), (100, [4, 8])], [402 / 101, 804 / 101], id="weights 1 and 100"),
]


@pytest.mark.parametrize(("updates", "expected"), EXACT)
def test_the_oracles_exact_cases_hold_in_float64(updates: Any, expected: list[float]) -> None:
    np.testing.assert_allclose(apply(updates), expected, rtol=4e-16)


@pytest.mark.parametrize(("updates", "expected"), EXACT)
def test_the_oracles_exact_cases_hold_to_the_bit_in_float32_through_the_store(
    updates: Any, expected: list[float]
) -> None:
    found, _ = aggregated(
        [
            (f"site-{number}", weight, {"w": np.array(value, dtype=np.float32)})
            for number, (weight, value) in enumerate(updates)
        ],
        {"w": np.zeros(len(expected), dtype=np.float32)},
    )
    assert found["w"].tolist() == np.array(expected, dtype=np.float32).tolist()


def test_sites_that_add_1_three_times_end_at_the_oracles_matrix() -> None:
    model: dict[str, Any] = {"w": np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.float32)}
    for _ in range(3):
        model, _ = aggregated([(f"site-{number}", 1.0, {"w": model["w"] + 1}) for number in range(3)], model)
    assert model["w"].tolist() == [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]
