"""Which updates count, and what has counted of a site's so far: pure functions of the rounds' records."""

from collections.abc import Collection, Mapping, Sequence

from fedpool.manifest import Used
from fedpool.tasks.record import Record
from fedpool.tasks.strategy import Shares, relative

NONE_USED = Used(round=-1)


def counting(weights: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """site -> weight with which its update counts in a round, relative to the heaviest; 0 where it does not count.

    Args:
        weights: of the accepted updates.
        factors: site -> factor on its weight; 1 for a site that is not named.
    """
    steps = relative(weights)
    shares = relative({site: factors.get(site, 1.0) for site in weights})
    return relative({site: steps[site] * shares[site] for site in weights})


def last_used(records: Sequence[Record], factors: Mapping[str, float], sites: Collection[str]) -> dict[str, Used]:
    """site -> its last update that counted: it was accepted, in time, and its weight was not 0."""
    found = dict.fromkeys(sites, NONE_USED)
    for record in records:
        if record["task"] != "train":
            continue
        accepted = {entry["site"]: entry for entry in record["accepted"]}
        counted = counting({site: entry["weight"] for site, entry in accepted.items()}, factors)
        for site, weight in counted.items():
            if weight and site in found:
                entry = accepted[site]
                found[site] = Used(round=record["round"], attempt=entry["attempt"], scale=entry.get("scale", 1.0))
    return found


def first_weights(records: Sequence[Record], factors: Mapping[str, float]) -> dict[str, float]:
    """site -> weight of its first accepted training update that had any; 0 of a site whose updates have had none so far.

    Rounds in which no update counted made nothing, and do not matter.
    """
    found: dict[str, float] = {}
    for record in records:
        if record["task"] == "train":
            weights = {entry["site"]: entry["weight"] for entry in record["accepted"]}
            if any(counting(weights, factors).values()):
                found |= {site: found.get(site) or weight for site, weight in weights.items()}
    return found


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
