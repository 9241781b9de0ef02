"""Robust aggregation against naive references and the bound from each rule's theorem."""

import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool.errors import RecipeError, RoundError
from fedpool.tasks.aggregator import Aggregator, RoundMean
from fedpool.tasks.aggregators import Bulyan, GeometricMedian, Krum, Mean, Median, MultiKrum
from fedpool.tasks.choose_aggregator import chosen, plain_names, written
from fedpool.tasks.geometry import Geometry, block_products
from fedpool.tasks.own_function import OwnFunction, imported
from fedpool.tasks.robust import bulyan_selection
from fedpool.tasks.robust import median as middle
from fedpool.tasks.strategy import State, Update

Array = np.ndarray[Any, np.dtype[np.float64]]
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {},
    "trimmed_mean": {"trim_ratio": 0.2},
    "krum": {"num_byzantine": 2},
    "multi_krum": {"num_byzantine": 2, "num_selected": 3},
    "bulyan": {"num_byzantine": 2},
    "geometric_median": {},
    "norm_clipped_mean": {"clip_norm": 1.5},
}
ROBUST = sorted(RULES.keys() - {"mean", "norm_clipped_mean"})


def made(name: str, **changes: Any) -> Aggregator:
    return chosen({"kind": name, **RULES[name], **changes})


def combined(
    aggregator: Aggregator, models: Array, weights: Sequence[float] | None = None, base: Array | None = None
) -> Array:
    """The aggregate of (n, elements) models, as streaming computes it: with a survey first if
    the rule needs one.
    """
    start = torch.zeros(models.shape[1], dtype=torch.float64) if base is None else torch.from_numpy(base)
    each = [1.0] * len(models) if weights is None else list(weights)
    values = [torch.from_numpy(model.copy()) for model in models]
    sites = tuple(f"site-{k:02d}" for k in range(len(models)))
    if aggregator.surveys:
        products = torch.stack(block_products([value - start for value in values])).sum(0)
        aggregator = aggregator.survey(Geometry(sites, tuple(each), products))
    updates = [Update(site, weight, {"w": value}) for site, weight, value in zip(sites, each, values, strict=True)]
    found: Array = aggregator.combine("w", State({"w": start}), updates).numpy()
    assert all(np.array_equal(value.numpy(), model) for value, model in zip(values, models, strict=True))
    return found


def distances(models: Array) -> Array:
    found: Array = ((models[:, None] - models[None]) ** 2).sum(axis=-1)
    return found


def krum_reference(models: Array, f: int, m: int) -> list[int]:
    scores = np.sort(distances(models), axis=1)[:, 1 : max(1, len(models) - f - 2) + 1].sum(axis=1)
    return sorted(np.argsort(scores, kind="stable")[:m].tolist())


def bulyan_reference(models: Array, f: int, midpoint: bool = False) -> Array:
    left = list(range(len(models)))
    chosen: list[int] = []
    while len(chosen) < len(models) - 2 * f:
        chosen.append(left.pop(krum_reference(models[left], f, 1)[0]))
    picked = models[sorted(chosen)]
    middle = np.median(picked, axis=0) if midpoint else np.sort(picked, axis=0)[(len(picked) - 1) // 2]
    near = np.argsort(np.abs(picked - middle), axis=0, kind="stable")[: len(chosen) - 2 * f]
    found: Array = np.take_along_axis(picked, near, axis=0).mean(axis=0)
    return found


def geometric_median_reference(models: Array, weights: Array | None = None) -> Array:
    z: Array = models.mean(axis=0)
    for _ in range(2000):
        nearness = (1 if weights is None else weights) / np.maximum(np.linalg.norm(models - z, axis=1), 1e-9)
        z = (nearness[:, None] * models).sum(axis=0) / nearness.sum()
    return z


def reference(name: str, models: Array) -> Array:
    n, f = len(models), 2
    match name:
        case "mean":
            return models.mean(axis=0)  # type: ignore[no-any-return]
        case "median":
            return np.median(models, axis=0)
        case "trimmed_mean":
            k = int(0.2 * n)
            return np.sort(models, axis=0)[k : n - k].mean(axis=0)  # type: ignore[no-any-return]
        case "krum":
            return models[krum_reference(models, f, 1)].mean(axis=0)  # type: ignore[no-any-return]
        case "multi_krum":
            return models[krum_reference(models, f, 3)].mean(axis=0)  # type: ignore[no-any-return]
        case "bulyan":
            return bulyan_reference(models, f)
        case "geometric_median":
            return geometric_median_reference(models)
        case _:
            norms = np.linalg.norm(models, axis=1, keepdims=True)
            return (models * np.minimum(1, 1.5 / norms)).mean(axis=0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", RULES)
def test_it_does_what_a_naive_reference_does(name: str, seed: int) -> None:
    models = np.random.default_rng(seed).normal(size=(11 + seed, 7))
    np.testing.assert_allclose(combined(made(name), models), reference(name, models), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=30, deadline=None)
@given(value=st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3), n=st.integers(11, 14))
def test_equal_updates_give_that_update_to_the_bit(name: str, value: list[float], n: int) -> None:
    models = np.tile(np.array(value) + 0.0, (n, 1))
    assert combined(made(name), models).tolist() == models[0].tolist()


@pytest.mark.parametrize("name", ROBUST)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    attack=st.lists(st.floats(-1e30, 1e30), min_size=4, max_size=4),
    apart=st.booleans(),
)
def test_two_of_eleven_arbitrary_updates_cannot_pull_it_out_of_the_others(
    name: str, seed: int, attack: list[float], apart: bool
) -> None:
    rng = np.random.default_rng(seed)
    honest = rng.normal(size=(9, 4))
    hostile = np.array([attack, [-x for x in attack] if apart else attack])
    models = rng.permutation(np.concatenate([honest, hostile]), axis=0)
    found = combined(made(name), models)
    if name == "geometric_median":  # the bound of Pillutla et al. 2019, theorem 3, with a share of 2 in 11
        center = honest.mean(axis=0)
        radius = np.linalg.norm(honest - center, axis=1).max()
        assert np.linalg.norm(found - center) <= 2 * 9 / (9 - 2) * radius + 1e-6
        return
    low, high = honest.min(axis=0), honest.max(axis=0)
    if name in ("median", "trimmed_mean"):
        room: Any = 0.0
    elif name == "bulyan":  # the values nearest to a median in the honest range: no farther away than honest values
        room = high - low
    else:  # a selected update's Krum score is at most an honest one's: n - f - 2 squared honest distances
        room = np.sqrt((11 - 2 - 2) * distances(honest).max())
    assert (found >= low - room - 1e-9).all() and (found <= high + room + 1e-9).all()


def test_bulyans_median_of_an_even_number_is_an_element_or_the_midpoint_as_asked() -> None:
    for seed in range(6):
        models = np.random.default_rng(seed).normal(size=(12, 7))
        element, middle = (combined(made("bulyan", even_median=what), models) for what in ("element", "midpoint"))
        np.testing.assert_allclose(element, bulyan_reference(models, 2), rtol=1e-12)
        np.testing.assert_allclose(middle, bulyan_reference(models, 2, midpoint=True), rtol=1e-12)
        assert not np.array_equal(element, middle)
        assert np.array_equal(element, combined(made("bulyan"), models))


def test_the_geometric_median_counts_updates_by_their_weights_unless_told_not_to() -> None:
    models, weights = np.random.default_rng(2).normal(size=(12, 3)), np.arange(1.0, 13)
    found = combined(made("geometric_median"), models, weights=list(weights))
    np.testing.assert_allclose(found, geometric_median_reference(models, weights), rtol=1e-6)
    np.testing.assert_allclose(
        combined(made("geometric_median", weighted=False), models, weights=list(weights)),
        geometric_median_reference(models),
        rtol=1e-6,
    )
    twice = np.concatenate([models, models[:1]])  # splitting a site in two changes nothing
    split = [weights[0] / 2, *weights[1:], weights[0] / 2]
    np.testing.assert_allclose(combined(made("geometric_median"), twice, weights=split), found, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ROBUST) - {"geometric_median"}))
def test_weights_do_not_count(name: str) -> None:
    models = np.random.default_rng(1).normal(size=(12, 3))
    weighted = combined(made(name), models, weights=list(range(1, 13)))
    assert weighted.tolist() == combined(made(name), models).tolist()


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("power", [-1000, 3, 1020])
def test_a_power_of_two_times_all_weights_changes_no_bit(name: str, power: int) -> None:
    """Even if the sum of the weights overflows."""
    rng = np.random.default_rng(3)
    models, weights = rng.normal(size=(12, 3)), rng.uniform(1, 9, 12)
    found = combined(made(name), models, weights=list(weights))
    assert combined(made(name), models, weights=list(weights * 2.0**power)).tolist() == found.tolist()
    # As when aggregators were given weights relative to the heaviest.
    assert combined(made(name), models, weights=list(weights / weights.max())).tolist() == found.tolist()


def test_the_clipped_mean_is_weighted_and_clips_differences_to_the_global_model() -> None:
    base, models = np.array([1.0, 1.0]), np.array([[1.0, 11.0], [2.0, 1.0]])
    found = combined(made("norm_clipped_mean", clip_norm=5.0), models, weights=[3.0, 1.0], base=base)
    np.testing.assert_allclose(found, [(3 * 1 + 2) / 4, (3 * 6 + 1) / 4])


def test_an_update_too_far_away_to_be_squared_is_far_away() -> None:
    models = np.random.default_rng(0).normal(size=(11, 3))
    models[4] = 1e300
    for name in ROBUST:
        assert np.abs(combined(made(name), models)).max() < 10, name


KNOWN = "mean, median, trimmed_mean, krum, multi_krum, bulyan, geometric_median, norm_clipped_mean"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "krum",
            'aggregator "krum" needs num_byzantine: Krum(num_byzantine=...), or in JSON {"kind": "krum", "num_byzantine": ...}',
        ),
        (Krum, 'aggregator "krum" needs num_byzantine: Krum(num_byzantine=...)'),
        ({"kind": "multi_krum", "num_selected": 1}, "needs num_byzantine: MultiKrum(num_byzantine=...)"),
        ("trimmed_mean", "needs trim_ratio: TrimmedMean(trim_ratio=...)"),
        ("norm_clipped_mean", "needs clip_norm: NormClippedMean(clip_norm=...)"),
        ({"kind": "krum", "num_byzantine": 0}, "Krum: num_byzantine: must be greater than or equal to 1, got 0"),
        ({"kind": "trimmed_mean", "trim_ratio": 0.5}, "TrimmedMean: trim_ratio: must be less than 0.5, got 0.5"),
        ({"kind": "median", "trim_ratio": 0.1}, "Median: trim_ratio: there is no such field"),
        ({"kind": "bulyan", "num_byzantine": 1, "even_medians": "midpoint"}, "did you mean even_median?"),
        ({"kind": "bulyan", "num_byzantine": 1, "even_median": "upper"}, "must be 'element' or 'midpoint'"),
        ("crum", f'aggregator "crum" is unknown. Did you mean "krum"? Use {KNOWN}, or the path of a function'),
        ({"kind": "Median"}, 'aggregator "Median" is unknown. Did you mean "median"?'),
        ("zzz", f'aggregator "zzz" is unknown. Use {KNOWN}'),
        ({"num_byzantine": 1}, f'has no "kind": give one of {KNOWN}'),
        (3, "aggregator=3 cannot be used: give a name"),
        (RoundMean(), "cannot be used: give a name, an instance such as Krum(num_byzantine=...), or a function"),
        ("no.such:rule", "aggregator 'no.such:rule' cannot be imported"),
        ("fedpool:no_such", "cannot be imported"),
        ("string:digits", "is a str: give the path of a function"),
        (lambda values, weights: values[0], "put it into a module"),
    ],
)
def test_what_cannot_work_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        chosen(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "made", "as_json"),
    [
        ("mean", Mean(), "mean"),
        ({"kind": "median"}, Median(), "median"),
        (Median, Median(), "median"),
        ("geometric_median", GeometricMedian(), {"kind": "geometric_median", "weighted": True}),
        (Krum(num_byzantine=2), Krum(num_byzantine=2), {"kind": "krum", "num_byzantine": 2}),
        (
            {"kind": "multi_krum", "num_byzantine": 2},
            MultiKrum(num_byzantine=2),
            {"kind": "multi_krum", "num_byzantine": 2, "num_selected": None},
        ),
        (middle, OwnFunction("fedpool.tasks.robust:median"), "fedpool.tasks.robust:median"),
        ("fedpool.tasks.robust:median", OwnFunction("fedpool.tasks.robust:median"), "fedpool.tasks.robust:median"),
    ],
)
def test_what_a_user_writes_becomes_an_aggregator_and_that_the_same_again(
    given: Any, made: Aggregator, as_json: Any
) -> None:
    assert chosen(given) == made == chosen(written(made)) == chosen(made)
    assert written(made) == as_json


def test_plain_names_are_those_of_the_aggregators_that_need_nothing() -> None:
    assert plain_names() == ["mean", "median", "geometric_median"]


def test_an_aggregator_is_frozen_and_shows_what_it_was_built_with() -> None:
    rule, krum = Bulyan(num_byzantine=2), cast(Any, Krum)
    assert repr(rule) == "Bulyan(num_byzantine=2, even_median='element')"
    assert hash(rule) == hash(Bulyan(num_byzantine=2)) and rule != Bulyan(num_byzantine=2, even_median="midpoint")
    with pytest.raises(RecipeError, match=r"is frozen: build a new one with num_byzantine=3"):
        rule.num_byzantine = 3  # type: ignore[misc]  # it is what is tested
    with pytest.raises(RecipeError, match=r"takes its fields by name, got 2 .*Krum\(num_byzantine=\.\.\.\)"):
        krum(2)
    with pytest.raises(RecipeError, match="Krum: num_byzantine: is required, but was not given"):
        krum()


@pytest.mark.parametrize("name", ["krum", "bulyan", "trimmed_mean"])
def test_a_round_with_too_few_updates_fails_with_how_many_it_needs(name: str) -> None:
    with pytest.raises(RoundError, match="the aggregator needs"):
        combined(made(name), np.zeros((3, 2)))


def a_rule(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return values.max(dim=0).values * (weights > 0).sum()


def a_wrong_rule(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return values


def the_weights(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return weights


def test_a_function_of_the_users_is_given_absolute_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "users_rules", sys.modules[__name__])
    rule = chosen("users_rules:the_weights")
    assert combined(rule, np.zeros((3, 3)), weights=[3.0, 10.0, 1e308]).tolist() == [3.0, 10.0, 1e308]


def test_a_function_of_the_users_is_an_aggregator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "users_rules", sys.modules[__name__])
    assert imported("users_rules:a_rule") is a_rule
    rule = chosen("users_rules:a_rule")
    assert isinstance(rule, OwnFunction)
    assert combined(rule, np.array([[1.0, 5.0], [2.0, 3.0]])).tolist() == [4.0, 10.0]
    with pytest.raises(RoundError, match=r"must return a tensor of shape \[2\], but it returned \[3, 2\]"):
        combined(chosen("users_rules:a_wrong_rule"), np.zeros((3, 2)))


def divides_by_0(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return values[0] / 0


def exits(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("divides_by_0", "divides_by_0 returned NaN or infinity for parameter w, although every update is finite"),
        ("exits", r"exits failed at parameter w: SystemExit: 3 \(.*test_robust\.py, line \d+\)"),
    ],
)
def test_what_a_function_of_the_users_does_wrong_is_said_with_its_path(
    monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "users_rules", sys.modules[__name__])
    with pytest.raises(RoundError, match=f"^aggregator users_rules:{words}"):
        combined(chosen(f"users_rules:{name}"), np.ones((3, 2)))


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=6))
def test_the_median_is_within_what_is_there_however_large(values: list[float]) -> None:
    found = combined(made("median"), np.array(values)[:, None]).item()
    assert min(values) <= found <= max(values)
    np.testing.assert_allclose(found, np.median(np.array(values) / 2) * 2, rtol=1e-12, atol=1e-300)


def updates_of_integers(seed: int, n: int, elements: int) -> Array:
    """Updates whose squared distances are whole numbers, so ties are exact and frequent."""
    return np.random.default_rng(seed).integers(-2, 3, (n, elements)).astype(np.float64)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2)])
def test_bulyans_ties_are_the_first_sites_and_not_the_roundings(seed: int, n: int, f: int) -> None:
    """Among the last updates that Krum picks from, the two nearest to each other always tie."""
    models = np.random.default_rng(seed).normal(size=(n, 650))
    # Exact: Python does not round integers.
    whole = [[int(value * 2**60) for value in row] for row in models.tolist()]
    squared = [[sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) for other in whole] for one in whole]
    left = list(range(n))
    chosen: list[int] = []
    while len(chosen) < n - 2 * f:
        near = max(1, len(left) - f - 2)
        scores = [sum(sorted(squared[i][j] for j in left if j != i)[:near]) for i in left]
        chosen.append(left.pop(scores.index(min(scores))))
    values = [torch.from_numpy(model.copy()) for model in models]
    products = torch.stack(block_products(values)).sum(0)
    geometry = Geometry(tuple(f"s{k}" for k in range(n)), (1.0,) * n, products)
    assert bulyan_selection(geometry.squared_distances, f) == sorted(chosen)


def test_inner_products_are_symmetric_to_the_bit_and_right() -> None:
    for elements in (1, 3, 64, 650, 16_384, 40_000):
        values = list(torch.randn(9, elements, dtype=torch.float64, generator=torch.Generator().manual_seed(elements)))
        for chunk in block_products(values):
            assert torch.equal(chunk, chunk.T)
        found = torch.stack(block_products(values)).sum(0)
        stacked = torch.stack(values)
        torch.testing.assert_close(found, stacked @ stacked.T, rtol=1e-12, atol=1e-9)


def test_inner_products_are_pairs_added_in_an_order_that_is_written_down() -> None:
    """A reference in plain Python, independent of any library or processor."""
    values = torch.randn(3, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(one: list[float], other: list[float]) -> float:
        terms = [a * b for a, b in zip(one, other, strict=True)] + [0.0] * 28
        while len(terms) > 1:
            half = len(terms) // 2
            terms = [terms[k] + terms[half + k] for k in range(half)]
        return terms[0]

    (found,) = block_products(list(values))
    assert found.tolist() == [[product(a, b) for b in values.tolist()] for a in values.tolist()]


def test_equal_updates_tie_and_the_first_site_wins() -> None:
    models = updates_of_integers(0, 7, 5)
    models[4] = models[2] = models.mean(axis=0).round()
    assert np.array_equal(combined(made("krum", num_byzantine=1), models), models[2])
