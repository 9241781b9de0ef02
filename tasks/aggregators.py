"""fedpool's aggregators: the weighted mean, and rules that a few wrong updates can't pull far.

Each is a frozen model of its parameters. The same model is its part of a deployment's form and of
`job.json`. The computations are in `tasks.mean` and `tasks.robust`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field

from fedpool.fields import Checked
from fedpool.tasks.aggregator import Aggregator, RoundMean, stacked
from fedpool.tasks.geometry import Geometry
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

_ARBITRARY = "number of updates of a round that may be arbitrary"


class Rule(Checked, Aggregator):
    """An aggregator that is part of fedpool: its name and its parameters.

    Raises:
        FieldsError (a RecipeError and a pydantic.ValidationError): a parameter is missing, unknown
            or out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str


class _SurveyingRule(Rule):
    """A rule that compares whole updates, and combines them according to the survey of a round."""

    surveys: ClassVar[bool] = True

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        raise AssertionError("survey() comes first")


def _prefilled(value: float) -> dict[str, Any]:
    # Prefect's form distinguishes the aggregators by the fields that have a value, so each starts
    # with one.
    return {"default": value}


class Mean(Rule):
    """The weighted mean of the updates.

    Needs:
        n >= 1

    Paper:
        McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
        Data", algorithm 1 (https://arxiv.org/abs/1602.05629)
    """

    kind: Literal["mean"] = Field(default="mean", repr=False)

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        return RoundMean().combine(name, state, updates)


class Median(Rule):
    """The coordinate-wise median; for an even number of updates, the mean of the middle two.

    All updates count equally.

    Needs:
        n >= 1

    Paper:
        Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        algorithm 1, option I (https://arxiv.org/abs/1803.01498)
    """

    kind: Literal["median"] = Field(default="median", repr=False)

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        return median(stacked(name, updates))


class TrimmedMean(Rule):
    """The coordinate-wise mean without the floor(trim_ratio n) lowest and as many highest values.

    All updates count equally.

    Needs:
        n >= 1 / trim_ratio (fewer would trim nothing)

    Paper:
        Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        algorithm 1, option II (https://arxiv.org/abs/1803.01498)
    """

    kind: Literal["trimmed_mean"] = Field(default="trimmed_mean", repr=False)
    trim_ratio: float = Field(
        description="share of values dropped at each end", gt=0, lt=0.5, json_schema_extra=_prefilled(0.1)
    )

    @property
    def fewest(self) -> int:
        return next(n for n in range(1, 1 + int(2 / self.trim_ratio) + 1) if num_trimmed(n, self.trim_ratio) >= 1)

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        self.check(len(updates))
        return trimmed_mean(stacked(name, updates), num_trimmed(len(updates), self.trim_ratio))


class Krum(_SurveyingRule):
    """The update with the smallest sum of squared distances to its n - f - 2 nearest others.

    All updates count equally. The first site wins ties.

    Needs:
        n >= 2 f + 3

    Paper:
        Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
        Descent", section 4 (https://arxiv.org/abs/1703.02757)
    """

    kind: Literal["krum"] = Field(default="krum", repr=False)
    num_byzantine: int = Field(description=_ARBITRARY, ge=1, json_schema_extra=_prefilled(1))

    @property
    def fewest(self) -> int:
        return 2 * self.num_byzantine + 3

    def survey(self, geometry: Geometry) -> Aggregator:
        self.check(len(geometry.sites))
        return _mean_of_the_nearest(geometry, self.num_byzantine, 1)


class MultiKrum(_SurveyingRule):
    """The mean of the m updates with the best Krum scores.

    The score of an update is the sum of squared distances to its n - f - 2 nearest others; lower is
    better. m is `num_selected`, by default n - f - 2. All updates count equally. The first site
    wins ties.

    Needs:
        n >= max(2 f + 3, m + f + 2)

    Paper:
        Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
        Descent", section 4 (https://arxiv.org/abs/1703.02757)
    """

    kind: Literal["multi_krum"] = Field(default="multi_krum", repr=False)
    num_byzantine: int = Field(description=_ARBITRARY, ge=1, json_schema_extra=_prefilled(1))
    num_selected: int | None = Field(
        default=None, description="number of updates to average; empty: all but num_byzantine + 2", ge=1
    )

    @property
    def fewest(self) -> int:
        f = self.num_byzantine
        return max(2 * f + 3, (self.num_selected or 1) + f + 2)

    def survey(self, geometry: Geometry) -> Aggregator:
        n, f = len(geometry.sites), self.num_byzantine
        self.check(n)
        return _mean_of_the_nearest(geometry, f, self.num_selected or n - f - 2)


class Bulyan(_SurveyingRule):
    """Applies Krum n - 2 f times, then averages in each coordinate the n - 4 f values nearest the
    median.

    The median of an even number of values is the lower of the middle two, because the paper's
    median is an element. With `even_median="midpoint"` it is the mean of the two. When Krum picks
    from f + 2 updates or fewer, the paper's sum would be empty, so Krum uses the distance to the
    nearest other update. The first site wins ties.

    Needs:
        n >= 4 f + 3

    Paper:
        El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium",
        section 4 (https://arxiv.org/abs/1802.07927)
    """

    kind: Literal["bulyan"] = Field(default="bulyan", repr=False)
    num_byzantine: int = Field(description=_ARBITRARY, ge=1, json_schema_extra=_prefilled(1))
    even_median: Literal["element", "midpoint"] = Field(
        default="element",
        description="the median of an even number of values: element, the lower of the middle two, which the paper allows; "
        "or midpoint, their mean",
    )

    @property
    def fewest(self) -> int:
        return 4 * self.num_byzantine + 3

    def survey(self, geometry: Geometry) -> Aggregator:
        self.check(len(geometry.sites))
        chosen = bulyan_selection(geometry.squared_distances, self.num_byzantine)
        num_near = len(chosen) - 2 * self.num_byzantine
        sites = frozenset(geometry.sites[i] for i in chosen)
        return _MeanAroundMedian(sites, num_near, midpoint=self.even_median == "midpoint")


class GeometricMedian(_SurveyingRule):
    """The point with the smallest sum of distances to the updates (smoothed Weiszfeld algorithm).

    Distances are weighted by the updates' weights, as in the paper, which assumes that no site lies
    about its weight. With `weighted=False` all updates count equally. The paper stops after a few
    steps, this implementation at convergence.

    Needs:
        n >= 1

    Paper:
        Pillutla et al. 2019, "Robust Aggregation for Federated Learning", algorithm 2
        (https://arxiv.org/abs/1912.13445)
    """

    kind: Literal["geometric_median"] = Field(default="geometric_median", repr=False)
    weighted: bool = Field(
        default=True,
        description="whether updates count by their weights, as in the paper; otherwise all count equally, so a site gains "
        "nothing by lying about its weight",
    )

    def survey(self, geometry: Geometry) -> Aggregator:
        weights = torch.tensor(geometry.weights, dtype=torch.float64) if self.weighted else None
        found = geometric_median_weights(geometry.products, weights)
        return RoundMean(dict(zip(geometry.sites, found, strict=True)))


class NormClippedMean(_SurveyingRule):
    """The mean after scaling larger differences to the global model down to a common L2 norm.

    Needs:
        n >= 1

    Paper:
        Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 3
        (https://arxiv.org/abs/1911.07963)
    """

    kind: Literal["norm_clipped_mean"] = Field(default="norm_clipped_mean", repr=False)
    clip_norm: float = Field(
        description="L2 norm to which larger differences to the global model are scaled down",
        gt=0,
        allow_inf_nan=False,
        json_schema_extra=_prefilled(1.0),
    )

    def survey(self, geometry: Geometry) -> Aggregator:
        norms = geometry.norms.tolist()
        scales = {
            site: self.clip_norm / norm
            for site, norm in zip(geometry.sites, norms, strict=True)
            if norm > self.clip_norm
        }
        return RoundMean(scales=scales)


AGGREGATORS: Mapping[str, type[Rule]] = {
    kind.model_fields["kind"].default: kind
    for kind in (Mean, Median, TrimmedMean, Krum, MultiKrum, Bulyan, GeometricMedian, NormClippedMean)
}
"""Name -> the aggregator, in display order."""


def _mean_of_the_nearest(geometry: Geometry, num_byzantine: int, num_selected: int) -> Aggregator:
    chosen = multi_krum(geometry.squared_distances, num_byzantine, num_selected)
    return RoundMean({geometry.sites[i]: 1.0 for i in chosen})


@dataclass(frozen=True)
class _MeanAroundMedian(Aggregator):
    """Bulyan's second step, for one round."""

    sites: frozenset[str]
    num_near: int
    midpoint: bool

    def combine(self, name: str, state: State, updates: Sequence[Update]) -> torch.Tensor:
        chosen = [update for update in updates if update.key in self.sites]
        return mean_around_median(stacked(name, chosen), self.num_near, midpoint=self.midpoint)
