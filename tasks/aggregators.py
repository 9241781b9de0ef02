"""How the updates of a round become one: the weighted mean, or a rule that a few wrong updates cannot pull far.

An aggregator is frozen. It is given block after block and holds a block of each update at most; one that looks at whole updates
asks for a survey first. What is computed is in `tasks.mean` and `tasks.robust`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedpool.errors import RecipeError, RoundError
from fedpool.tasks.geometry import Geometry
from fedpool.tasks.mean import weighted_mean
from fedpool.tasks.robust import (
    bulyan_selection,
    geometric_median_weights,
    mean_around_median,
    median,
    multi_krum,
    num_trimmed,
    trimmed_mean,
)
from fedpool.tasks.strategy import State, Update

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A rule of the user's: ((n, elements) values, (n,) weights), both float64, to (elements,)."""


class Aggregator(ABC):
    """How updates become one."""

    surveys: bool = False
    """Whether `survey` is to be called before the first block."""

    @property
    def fewest(self) -> int:
        """The fewest updates that it works with."""
        return 1

    def survey(self, geometry: Geometry) -> "Aggregator":
        """The aggregator for one round, by how its updates lie to each other."""
        return self

    @abstractmethod
    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        """One block of the aggregate.

        Args:
            name: of the parameter.
            state: with the global model's block.
            updates: in sorted site order.
        """

    def check(self, num_updates: int) -> None:
        """Raise `RoundError` when a round has too few updates."""
        if num_updates < self.fewest:
            raise RoundError(f"the aggregator needs {self.fewest} updates with a weight above 0, and has {num_updates}")


@dataclass(frozen=True)
class Mean(Aggregator):
    """The mean by the weights of the updates.

    Needs:
        n >= 1

    Paper:
        McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1
        (https://arxiv.org/abs/1602.05629)
    """

    weights: Mapping[str, float] | None = None
    """site -> weight, where it is not the update's own."""
    scales: Mapping[str, float] | None = None
    """site -> factor on its difference to the global model, where that is not 1."""

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        return weighted_mean((self._weight(update), self._value(name, state, update)) for update in self._used(updates))

    def _used(self, updates: Sequence[Update]) -> Sequence[Update]:
        return [update for update in updates if self._weight(update) > 0]  # the others need not be read

    def _weight(self, update: Update) -> float:
        return update.weight if self.weights is None else self.weights.get(update.site, 0.0)

    def _value(self, name: str, state: State, update: Update) -> torch.Tensor:
        scale = 1.0 if self.scales is None else self.scales.get(update.site, 1.0)
        value = update.params[name]
        return value if scale == 1.0 else torch.lerp(state.params[name], value, scale)


@dataclass(frozen=True)
class Median(Aggregator):
    """The coordinate-wise median; of an even number, the mean of the middle two.

    Needs:
        n >= 1

    Paper:
        Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", algorithm 1, option I
        (https://arxiv.org/abs/1803.01498)
    """

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        return median(_stacked(name, updates))


@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """The coordinate-wise mean without the floor(trim_ratio n) lowest and the floor(trim_ratio n) highest values.

    Needs:
        n >= 1 / trim_ratio (fewer would trim nothing)

    Paper:
        Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", algorithm 1, option II
        (https://arxiv.org/abs/1803.01498)
    """

    ratio: float

    @property
    def fewest(self) -> int:
        return next(n for n in range(1, 1 + int(2 / self.ratio) + 1) if num_trimmed(n, self.ratio) >= 1)

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        self.check(len(updates))
        return trimmed_mean(_stacked(name, updates), num_trimmed(len(updates), self.ratio))


@dataclass(frozen=True)
class Krum(Aggregator):
    """The mean of the m updates with the least sum of squared distances to their n - f - 2 nearest others.

    Of krum m is 1, of multi_krum `num_selected`, or n - f - 2 without that.

    Needs:
        n >= max(2 f + 3, m + f + 2)

    Paper:
        Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", section 4
        (https://arxiv.org/abs/1703.02757)
    """

    num_byzantine: int
    num_selected: int | None = None
    surveys = True

    @property
    def fewest(self) -> int:
        f = self.num_byzantine
        return max(2 * f + 3, (self.num_selected or 1) + f + 2)

    def survey(self, geometry: Geometry) -> Aggregator:
        n, f = len(geometry.sites), self.num_byzantine
        self.check(n)
        chosen = multi_krum(geometry.squared_distances, f, self.num_selected or n - f - 2)
        return Mean({geometry.sites[i]: 1.0 for i in chosen})

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        raise AssertionError("survey() comes first")


@dataclass(frozen=True)
class Bulyan(Aggregator):
    """Krum's choice, n - 2 f times over, and of those in each coordinate the mean of the n - 4 f nearest to the median.

    Of an even number of values the median is one of them, the lower of the middle two, because the paper's is an element; with
    `even_median="midpoint"` it is their mean. When Krum picks from f + 2 updates or fewer, it goes by the nearest other one,
    where the paper's sum would be empty. Of equals the first site wins.

    Needs:
        n >= 4 f + 3

    Paper:
        El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", section 4
        (https://arxiv.org/abs/1802.07927)
    """

    num_byzantine: int
    midpoint: bool = False
    selected: tuple[str, ...] = ()
    surveys = True

    @property
    def fewest(self) -> int:
        return 4 * self.num_byzantine + 3

    def survey(self, geometry: Geometry) -> Aggregator:
        self.check(len(geometry.sites))
        chosen = bulyan_selection(geometry.squared_distances, self.num_byzantine)
        return replace(self, selected=tuple(geometry.sites[i] for i in chosen))

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        chosen = [update for update in updates if update.site in self.selected]
        num_near = len(self.selected) - 2 * self.num_byzantine
        return mean_around_median(_stacked(name, chosen), num_near, midpoint=self.midpoint)


@dataclass(frozen=True)
class GeometricMedian(Aggregator):
    """The point with the least sum of distances to the updates, by the smoothed Weiszfeld algorithm.

    The distances count by the weights of the updates, as in the paper, where nobody lies about weights; with
    `weighted_median=False` all count alike. The paper stops after a few steps, this after convergence.

    Needs:
        n >= 1

    Paper:
        Pillutla et al. 2019, "Robust Aggregation for Federated Learning", algorithm 2 (https://arxiv.org/abs/1912.13445)
    """

    weighted: bool = True
    surveys = True

    def survey(self, geometry: Geometry) -> Aggregator:
        weights = torch.tensor(geometry.weights, dtype=torch.float64) if self.weighted else None
        found = geometric_median_weights(geometry.products, weights)
        return Mean(dict(zip(geometry.sites, found, strict=True)))

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        raise AssertionError("survey() comes first")


@dataclass(frozen=True)
class NormClippedMean(Aggregator):
    """The mean of updates whose differences to the global model are scaled down to one L2 norm.

    Needs:
        n >= 1

    Paper:
        Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 3 (https://arxiv.org/abs/1911.07963)
    """

    clip_norm: float
    surveys = True

    def survey(self, geometry: Geometry) -> Aggregator:
        norms = geometry.norms.tolist()
        scales = {
            site: self.clip_norm / norm
            for site, norm in zip(geometry.sites, norms, strict=True)
            if norm > self.clip_norm
        }
        return Mean(scales=scales)

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        raise AssertionError("survey() comes first")


@dataclass(frozen=True)
class Custom(Aggregator):
    """A function of the user's, by its import path."""

    path: str

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
        values = _stacked(name, updates)
        found = imported(self.path)(values, weights)
        if not isinstance(found, torch.Tensor) or found.shape != values.shape[1:]:
            what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise RoundError(
                f"aggregator {self.path} must return a tensor {list(values.shape[1:])}, it returned {what}"
            )
        return found.to(torch.float64)


def imported(path: str) -> Function:
    """The function at an import path, `package.module:function`.

    Raises:
        RecipeError: there is none, here and now.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"aggregator {path!r} cannot be imported ({error}): give 'package.module:function', installed where the "
            "coordinator runs"
        ) from None
    if not callable(function):
        raise RecipeError(f"aggregator {path!r} is not a function: it is a {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def make_aggregator(
    name: str,
    *,
    num_byzantine: int | None,
    trim_ratio: float | None,
    num_selected: int | None,
    clip_norm: float | None,
    min_clients: int,
    even_median: str | None = None,
    weighted_median: bool | None = None,
) -> Aggregator:
    """The aggregator that a recipe asks for, checked against the fewest updates that a round of it may have.

    Raises:
        RecipeError: a parameter is missing, is not this aggregator's, or cannot work with so few updates.
    """
    given = {
        "num_byzantine": num_byzantine,
        "trim_ratio": trim_ratio,
        "num_selected": num_selected,
        "clip_norm": clip_norm,
        "even_median": even_median,
        "weighted_median": weighted_median,
    }
    needed, allowed = PARAMETERS.get(name, ((), ())) if ":" not in name else ((), ())
    if ":" not in name and name not in PARAMETERS:
        raise RecipeError(
            f"aggregator {name!r} is not known: use {', '.join(PARAMETERS)}, or the path of a function, "
            "'package.module:function'"
        )
    if strange := [what for what, value in given.items() if value is not None and what not in (*needed, *allowed)]:
        raise RecipeError(f"{strange[0]}={given[strange[0]]} is not a parameter of aggregator {name!r}: leave it out")
    if missing := [what for what in needed if given[what] is None]:
        raise RecipeError(f"aggregator {name!r} needs {missing[0]}")
    aggregator = _make(name, given)
    if min_clients < aggregator.fewest:
        raise RecipeError(
            f"aggregator {name!r} with {', '.join(f'{what}={value}' for what, value in given.items() if value is not None)} "
            f"needs {aggregator.fewest} updates, and min_clients={min_clients} lets a round have fewer: raise min_clients"
        )
    return aggregator


PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mean": ((), ()),
    "median": ((), ()),
    "trimmed_mean": (("trim_ratio",), ()),
    "krum": (("num_byzantine",), ()),
    "multi_krum": (("num_byzantine",), ("num_selected",)),
    "bulyan": (("num_byzantine",), ("even_median",)),
    "geometric_median": ((), ("weighted_median",)),
    "norm_clipped_mean": (("clip_norm",), ()),
}
"""Aggregator -> the parameters that it needs, and those that it may have."""


def _make(name: str, given: Mapping[str, Any]) -> Aggregator:
    match name:
        case "mean":
            return Mean()
        case "median":
            return Median()
        case "trimmed_mean":
            return TrimmedMean(given["trim_ratio"])
        case "krum":
            return Krum(given["num_byzantine"], 1)
        case "multi_krum":
            return Krum(given["num_byzantine"], given["num_selected"])
        case "bulyan":
            return Bulyan(given["num_byzantine"], midpoint=given["even_median"] == "midpoint")
        case "geometric_median":
            return GeometricMedian(weighted=given["weighted_median"] is not False)
        case "norm_clipped_mean":
            return NormClippedMean(given["clip_norm"])
        case _:
            imported(name)  # now rather than in the first round
            return Custom(name)


def _stacked(name: str, updates: Sequence[Update]) -> torch.Tensor:
    return torch.stack([update.params[name] for update in updates])
