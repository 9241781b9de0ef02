"""Which sites a round goes ahead without: a function of the rounds' records, and of which sites
cannot be reached just now.

The first round that a site is missing from waits for it. The rounds after that would wait as long
again, and for nothing.
"""

from collections.abc import Collection, Mapping, Sequence

from prefect.logging import get_run_logger

from fedpool.site_order import in_order
from fedpool.sites.sites import Sites
from fedpool.tasks.record import RoundRecord


def silent(records: Sequence[RoundRecord]) -> frozenset[str]:
    """Sites that did not answer when they were last to take part, because they could not be reached
    or were late.

    Args:
        records: of the rounds so far.
    """
    found: set[str] = set()
    for record in records:
        answered = {entry.site for entry in (*record.accepted, *record.rejected, *record.probed)}
        answered |= {entry.site for entry in record.failed if not entry.away}
        missing = {entry.site for entry in record.failed if entry.away}
        missing |= {entry.site for entry in (*record.late, *record.not_asked)}
        found = (found - answered) | (missing - {entry.site for entry in record.accepted})
    return frozenset(found)


def left_out(
    records: Sequence[RoundRecord],
    chosen: Collection[str],
    unreachable: Mapping[str, str],
    *,
    probes: Collection[str],
    needed: int,
) -> dict[str, str]:
    """site -> why a round does not ask it. Empty when too few sites would be left: then the round
    waits for all of them.

    Args:
        records: of the rounds so far.
        chosen: the round's sites.
        unreachable: site -> why it cannot be reached now.
        probes: those of the sites whose updates would not be used.
        needed: updates without which the round fails.
    """
    without = silent(records)
    found = {site: unreachable[site] for site in in_order(chosen) if site in without and site in unreachable}
    left = set(chosen) - set(probes) - set(found)
    return found if len(left) >= needed else {}


async def unasked(
    records: Sequence[RoundRecord], sites: Sites, chosen: Collection[str], *, probes: Collection[str], needed: int
) -> dict[str, str]:
    """site -> why a round does not ask it, from the records and a look at the sites that were
    missing; see `left_out`.
    """
    missing = silent(records) & set(chosen)
    if not missing:
        return {}
    unreachable = await sites.unreachable(in_order(missing))
    found = left_out(records, chosen, unreachable, probes=probes, needed=needed)
    for site, reason in found.items():
        get_run_logger().warning("%s is not asked: %s", site, reason)
    return found


def how_to_resume(record: RoundRecord) -> str:
    """What to do about the sites that could not be reached in a round, as a line of its own;
    empty when there are none.
    """
    away = {entry.site for entry in record.failed if entry.away}
    away |= {entry.site for entry in record.not_asked}
    names = ", ".join(in_order(away - {entry.site for entry in record.accepted}))
    return f"\nonce {names} can be reached again: fedpool job resume {record.job_id}" if names else ""
