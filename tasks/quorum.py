"""Decides when a round has waited long enough: pure functions of the times of accepted updates.

Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design", section 4.1
(https://arxiv.org/abs/1902.01046): a round asks more sites than it needs, and closes once enough
have reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quorum:
    """The rule for closing a round.

    Attributes:
        min_clients: number of accepted updates that make a quorum.
        grace: time for the other sites after the quorum, as a fraction of the time until then;
            None: unlimited.
        take: maximum number of accepted updates; None: all.
    """

    min_clients: int
    grace: float | None = None
    take: int | None = None

    def closes_after(self, accepted_s: Sequence[float]) -> float | None:
        """When the round closes, in seconds since its start; None: no time is set yet.

        Args:
            accepted_s: when updates were accepted, in seconds since the round's start, ascending.
        """
        if self.take is not None and len(accepted_s) >= self.take:
            return accepted_s[self.take - 1]
        if self.grace is not None and len(accepted_s) >= self.min_clients:
            return accepted_s[self.min_clients - 1] * (1 + self.grace)
        return None
