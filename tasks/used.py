"""Which updates count, and what has counted of a site's so far: pure functions of the rounds'
records.
"""

from collections.abc import Collection, Mapping, Sequence

from fedpool.messages import Used
from fedpool.tasks.record import RoundRecord
from fedpool.tasks.strategy import Shares, relative

NONE_USED = Used(round=-1)


def counting(weights: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """site -> weight with which its update counts in a round, relative to the heaviest; 0 where it
    does not count.

    Args:
        weights: of the accepted updates.
        factors: site -> factor on its weight; 1 for a site that is not named.
    """
    steps = relative(weights)
    shares = relative({site: factors.get(site, 1.0) for site in weights})
    return relative({site: steps[site] * shares[site] for site in weights})


class Counted:
    """What has counted of the sites' updates in a job's rounds so far; each record is looked at
    once, however many there are.

    Args:
        factors: see `counting`.

    Attributes:
        first_weights: site -> weight of its first accepted training update that had any; 0 of a
            site whose updates have had none so far. Rounds in which no update counted made nothing,
            and do not matter.
        last_used: site -> its last update that counted: it was accepted, in time, and its weight
            was not 0.
    """

    __slots__ = ("_factors", "_num_seen", "first_weights", "last_used")

    def __init__(self, factors: Mapping[str, float]) -> None:
        self._factors = factors
        self._num_seen = 0
        self.first_weights: dict[str, float] = {}
        self.last_used: dict[str, Used] = {}

    def follow(self, records: Sequence[RoundRecord]) -> None:
        """Take in the rounds that have been committed since the last time.

        Args:
            records: of all the job's rounds so far.
        """
        for record in records[self._num_seen :]:
            self._num_seen += 1
            if record.task == "train":
                self._add(record)

    def used(self, sites: Collection[str]) -> dict[str, Used]:
        """site -> its last update that counted, or that none has."""
        return {site: self.last_used.get(site, NONE_USED) for site in sites}

    def _add(self, record: RoundRecord) -> None:
        # Of a site that has both, the fresh one, as in `aggregate`. Where sites see `last_used`, no
        # late update counts.
        accepted = {entry.site: entry for entry in (*record.late_accepted, *record.accepted)}
        weights = {site: entry.weight for site, entry in accepted.items()}
        counted = counting(weights, self._factors)
        if any(counted.values()):
            self.first_weights |= {site: self.first_weights.get(site) or weight for site, weight in weights.items()}
        for site, weight in counted.items():
            if weight:
                entry = accepted[site]
                scale = 1.0 if entry.scale is None else entry.scale
                self.last_used[site] = Used(round=record.round, attempt=entry.attempt, scale=scale)


def first_weights(records: Sequence[RoundRecord], factors: Mapping[str, float]) -> dict[str, float]:
    """site -> weight of its first training update that had any; see `Counted`."""
    counted = Counted(factors)
    counted.follow(records)
    return counted.first_weights


def job_shares(before: Mapping[str, float], now: Mapping[str, float], factors: Mapping[str, float]) -> Shares:
    """What sites weigh in a job.

    Args:
        before: see `first_weights`, of the rounds before.
        now: weights of this round's accepted updates.
        factors: see `counting`.
    """
    known = {**now, **{site: weight or now.get(site, 0.0) for site, weight in before.items()}}
    weights = counting(known, factors)
    return Shares({site: weights[site] if weight else 0.0 for site, weight in before.items()}, weights)
