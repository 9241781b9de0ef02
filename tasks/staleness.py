"""Late updates that count in a later round than their own: their weights, and which may still
arrive.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff,
https://arxiv.org/abs/2106.06639), for the polynomial weight; Xie et al. 2019, "Asynchronous
Federated Optimization" (FedAsync, https://arxiv.org/abs/1903.03934):

    w <- w + sum_k n_k s_k Delta_k / sum_k n_k s_k, where s_k = 1 / sqrt(1 + staleness_k)

Delta_k is an update minus the model that its site trained from. An update has its own round, whose
assignment it answers and whose model is its base, and the round that counts it. Its *staleness* is
the number of commits between the two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpool.tensors import Tensors

if TYPE_CHECKING:
    from fedpool.tasks.record import RoundRecord


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a late update comes from.

    Attributes:
        base: the global model of its own round.
        staleness: number of rounds from its own to the one that counts it, at least 1.
    """

    base: Tensors
    staleness: int


def discount(staleness: int) -> float:
    """Factor on the weight of an update: 1 for a fresh one."""
    return 1.0 / math.sqrt(1.0 + staleness)


def update_key(site: str, staleness: int) -> str:
    """Distinguishes the updates of a round. A site may have several: a fresh one and late ones."""
    return f"{site}@{staleness}" if staleness else site


@dataclass(frozen=True, slots=True)
class Awaited:
    """A late update that no round has judged yet. It may arrive in any of the listed attempts."""

    round: int
    site: str
    attempts: tuple[int, ...]


def awaited(records: "Sequence[RoundRecord]") -> list[Awaited]:
    """The late updates of training rounds that may still arrive, oldest first, from the committed
    records.

    A site does one assignment at a time: once its update of one round is judged, its updates of
    earlier rounds have been judged as well or will never arrive. So an update counts at most once,
    even if the job was lost and resumed.

    Args:
        records: of all the job's rounds so far.
    """
    owed: dict[tuple[int, str], tuple[int, ...]] = {}
    for record in records:
        if record.task != "train":
            continue
        judged = {entry.site: entry.round for entry in sorted(record.judged_late, key=lambda entry: entry.round)}
        judged |= {entry.site: record.round for entry in (*record.accepted, *record.rejected, *record.probed)}
        late: dict[tuple[int, str], tuple[int, ...]] = {}
        for entry in record.late:
            key = record.round, entry.site
            late[key] = (*late.get(key, ()), entry.attempt)
        owed = {
            (round, site): attempts for (round, site), attempts in (owed | late).items() if round > judged.get(site, -1)
        }
    return [Awaited(round, site, attempts) for (round, site), attempts in owed.items()]
