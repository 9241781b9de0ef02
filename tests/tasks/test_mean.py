"""The weighted mean: a running mean in float64 that reads its values once and in order."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.tasks.mean import weighted_mean

# Never -0.0: adding 0.0 to it gives 0.0, which is equal but has different bits.
numbers = st.floats(-1e12, 1e12).map(lambda value: value + 0.0)
weights = st.floats(1e-9, 1e9)
pairs = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.tuples(weights, st.lists(numbers, min_size=size, max_size=size)), min_size=1, max_size=8)
)


def mean_of(values: list[tuple[float, list[float]]]) -> torch.Tensor:
    return weighted_mean((weight, torch.tensor(value, dtype=torch.float64)) for weight, value in values)


def bits(value: torch.Tensor) -> bytes:
    return value.numpy().tobytes()


@settings(max_examples=100)
@given(pairs)
def test_it_is_the_mean_that_numpy_gives(values: list[tuple[float, list[float]]]) -> None:
    expected = np.average([value for _, value in values], axis=0, weights=[weight for weight, _ in values])
    largest = max(abs(number) for _, value in values for number in value)
    np.testing.assert_allclose(mean_of(values).numpy(), expected, rtol=1e-12, atol=1e-12 * largest)


@settings(max_examples=100)
@given(pairs, st.integers(-20, 20))
def test_weights_are_relative(values: list[tuple[float, list[float]]], power: int) -> None:
    scaled = [(weight * 2.0**power, value) for weight, value in values]
    assert bits(mean_of(scaled)) == bits(mean_of(values))


@settings(max_examples=200, deadline=None)
@given(pairs, st.integers(-990, 994))
def test_a_power_of_two_times_all_weights_changes_no_bit_also_where_their_sum_overflows(
    values: list[tuple[float, list[float]]], power: int
) -> None:
    scaled = [(weight * 2.0**power, value) for weight, value in values]
    assert bits(mean_of(scaled)) == bits(mean_of(values))


def test_weights_at_both_ends_of_the_range_can_be_averaged() -> None:
    heavy, values = 1.7e308, [1.0, 2.0, 3.0, 4.0, 9.0]
    assert mean_of([(heavy, [value]) for value in values]).item() == pytest.approx(3.8, rel=1e-15)
    assert (
        mean_of([(weight, [value]) for weight, value in zip([5e-324, heavy, 1.0, heavy], values, strict=False)]).item()
        == 3
    )
    assert mean_of([(5e-324, [1.0]), (5e-324, [4.0])]).item() == 2.5


@settings(max_examples=100)
@given(weights, st.lists(numbers, max_size=4))
def test_one_value_of_any_weight_is_the_mean_to_the_bit(weight: float, value: list[float]) -> None:
    assert bits(mean_of([(weight, value)])) == bits(torch.tensor(value, dtype=torch.float64))


@settings(max_examples=100)
@given(st.lists(weights, min_size=1, max_size=10), st.lists(numbers, min_size=1, max_size=4))
def test_equal_values_are_the_mean_to_the_bit(each: list[float], value: list[float]) -> None:
    assert bits(mean_of([(weight, value) for weight in each])) == bits(torch.tensor(value, dtype=torch.float64))


@settings(max_examples=100)
@given(pairs)
def test_the_mean_never_exceeds_what_it_is_the_mean_of(values: list[tuple[float, list[float]]]) -> None:
    found = mean_of(values).numpy()
    table = np.array([value for _, value in values])
    slack = 1e-12 * np.abs(table).max(axis=0)
    assert (found <= table.max(axis=0) + slack).all()
    assert (found >= table.min(axis=0) - slack).all()


def test_values_of_weight_0_count_for_nothing_whatever_they_hold() -> None:
    assert mean_of([(0.0, [float("nan")]), (2.0, [3.0]), (0.0, [float("inf")])]).tolist() == [3.0]


@pytest.mark.parametrize("values", [[], [(0.0, [1.0])]])
def test_without_a_weight_above_0_there_is_no_mean(values: list[tuple[float, list[float]]]) -> None:
    with pytest.raises(ValueError, match="no value has a weight above 0"):
        mean_of(values)


def test_values_are_read_once_and_in_order_and_left_as_they_were() -> None:
    read = []
    tensors = [torch.tensor([float(number)], dtype=torch.float64) for number in range(4)]

    def values() -> Iterator[tuple[float, torch.Tensor]]:
        for number, value in enumerate(tensors):
            read.append(number)
            yield 1.0, value

    assert weighted_mean(values()).tolist() == [1.5]
    assert read == [0, 1, 2, 3]
    assert [value.item() for value in tensors] == [0.0, 1.0, 2.0, 3.0]


def test_shapes_stay() -> None:
    assert weighted_mean([(1.0, torch.zeros(2, 3)), (1.0, torch.ones(2, 3))]).shape == (2, 3)
    assert weighted_mean([(1.0, torch.tensor(2.0))]).shape == ()
