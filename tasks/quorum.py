"""When a round has waited long enough: pure functions of the times at which updates were accepted.

Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design", section 4.1
(https://arxiv.org/abs/1902.01046): more sites are asked than are needed, and a round closes once
enough have reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quorum:
    """What a round waits for.

    Attributes:
        min_clients: accepted updates without which there is no quorum.
        grace: share of the time until the quorum that the rest are still given; None: whatever time
            they take.
        take: accepted updates that the round wants at most; None: all of them.
    """

    min_clients: int
    grace: float | None = None
    take: int | None = None

    def closes_after(self, accepted_s: Sequence[float]) -> float | None:
        """When the round closes, in seconds since its start; None when it still waits for whatever
        comes.

        Args:
            accepted_s: when updates were accepted, in seconds since the round's start, ascending.
        """
        if self.take is not None and len(accepted_s) >= self.take:
            return accepted_s[self.take - 1]
        if self.grace is not None and len(accepted_s) >= self.min_clients:
            return accepted_s[self.min_clients - 1] * (1 + self.grace)
        return None
