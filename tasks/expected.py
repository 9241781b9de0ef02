"""The requirements on an update, and the exception for a refused one, for the gate's parts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedpool.bounds import MAX_WEIGHT, Range
from fedpool.filters import Filter
from fedpool.tensors import Spec, Tensors

MAX_REASON = 1000
"""Characters of the reason of a refusal."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The requirements on an update.

    Attributes:
        spec: of the parameters and of the tensors beside them.
        base: the global model, needed for the norm of a difference.
        max_norm: see `Recipe`, like `clip`.
        positive_meta: names that the update's `meta` must have; the value 0 means that the site had
            nothing to train with, so its update has weight 0, unless `idle` is false.
        holes: the tensors that may hold infinity where `base` does; None: none may, and reasons are
            worded as in earlier versions, because records hold them.
        eval_examples: whether `meta` may say how many examples the metrics are of; if so, the
            number must be valid.
        filters: those that the update has passed.
        seed: of the job.
        max_weight: see `Recipe`, like `metric_ranges`.
        bounded: whether what a site says beside its tensors is bounded (`fedpool.bounds`); it was
            not in earlier versions.
    """

    job_id: str
    round: int
    task: str
    base_sha256: str
    spec: Spec
    transfer: str
    base: Tensors | None = None
    max_norm: float | None = None
    clip: bool = False
    positive_meta: tuple[str, ...] = ()
    holes: frozenset[str] | None = None
    idle: bool = True
    eval_examples: bool = True
    filters: tuple[Filter, ...] = ()
    seed: int = 0
    max_weight: float = MAX_WEIGHT
    metric_ranges: Mapping[str, Range] = field(default_factory=dict)
    bounded: bool = True

    @property
    def growth(self) -> float:
        """Upper bound of the factor by which filters may enlarge an update's file."""
        return math.prod(max(1.0, filter.growth) for filter in self.filters)


class Refused(Exception):
    """An update is refused, with a code for programs and a sentence for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} ...")
        self.code = code
