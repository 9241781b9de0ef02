"""Decides which updates count, and tracks those that did: functions of the rounds' records."""

from collections.abc import Collection, Mapping, Sequence

from fedpool.messages import Used
from fedpool.tasks.record import RoundRecord
from fedpool.tasks.strategy import Shares, relative

NONE_USED = Used(round=-1)


def counting(weights: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """site -> weight of its update in a round, relative to the heaviest; 0 if it doesn't count.

    Args:
        weights: of the accepted updates.
        factors: site -> factor on its weight; 1 for a site that isn't named.
    """
    steps = relative(weights)
    shares = relative({site: factors.get(site, 1.0) for site in weights})
    return relative({site: steps[site] * shares[site] for site in weights})


class Counted:
    """The updates that counted in a job's rounds so far. Reads each record only once.

    Args:
        factors: see `counting`.

    Attributes:
        first_weights: site -> weight of its first accepted training update with a weight above 0; 0
            if it has had none. Rounds in which no update counted are ignored, because they changed
            nothing.
        last_used: site -> its last update that counted: accepted, in time, and with a weight above
            0.
    """

    __slots__ = ("_factors", "_num_seen", "first_weights", "last_used")

    def __init__(self, factors: Mapping[str, float]) -> None:
        self._factors = factors
        self._num_seen = 0
        self.first_weights: dict[str, float] = {}
        self.last_used: dict[str, Used] = {}

    def follow(self, records: Sequence[RoundRecord]) -> None:
        """Read the rounds that have been committed since the last call.

        Args:
            records: of all the job's rounds so far.
        """
        for record in records[self._num_seen :]:
            self._num_seen += 1
            if record.task == "train":
                self._add(record)

    def used(self, sites: Collection[str]) -> dict[str, Used]:
        """site -> its last update that counted, or `NONE_USED`."""
        return {site: self.last_used.get(site, NONE_USED) for site in sites}

    def _add(self, record: RoundRecord) -> None:
        # If a site has both, use the fresh one, as in `aggregate`. If sites see `last_used`, late
        # updates don't count.
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
    """site -> weight of its first training update with a weight above 0; see `Counted`."""
    counted = Counted(factors)
    counted.follow(records)
    return counted.first_weights


def job_shares(before: Mapping[str, float], now: Mapping[str, float], factors: Mapping[str, float]) -> Shares:
    """The weights of sites in a job.

    Args:
        before: see `first_weights`, of the earlier rounds.
        now: weights of this round's accepted updates.
        factors: see `counting`.
    """
    known = {**now, **{site: weight or now.get(site, 0.0) for site, weight in before.items()}}
    weights = counting(known, factors)
    return Shares({site: weights[site] if weight else 0.0 for site, weight in before.items()}, weights)
