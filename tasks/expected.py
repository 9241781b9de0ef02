"""What an update has to fit, and the refusal of one that does not: what the parts of the gate
share.
"""

import math
from dataclasses import dataclass

from fedpool.filters import Filter
from fedpool.tensors import Spec, Tensors

MAX_REASON = 1000
"""Characters of the reason of a refusal."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What an update has to fit.

    `spec` holds what lies beside the parameters, too; `positive_meta` names what its `meta` must
    have: of that, 0 says that the site had nothing to train with and its update has weight 0,
    unless `idle` is false. `eval_examples`: whether `meta` may say how many examples the metrics
    are of, and then has to say it right. `filters` are those that an update has passed, `seed` is
    the job's. `base` is the global model, which the norm of a difference needs; see `Recipe` for
    `max_norm` and `clip`. `holes` names the tensors that may hold infinity where `base` does; None:
    as of an earlier version, whose sentences its records hold, none may.
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

    @property
    def growth(self) -> float:
        """How many times larger than an update of the model a file may be, because of the
        filters.
        """
        return math.prod(max(1.0, filter.growth) for filter in self.filters)


class Refused(Exception):
    """An update is refused, with a code for programs and a sentence for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} ...")
        self.code = code
