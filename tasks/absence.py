"""Which sites a round leaves out, given the rounds' records and the sites that are unreachable now.

The first round that a site is missing from waits for it. Later rounds would wait just as long, for
nothing.
"""

from collections.abc import Collection, Mapping, Sequence

from prefect.logging import get_run_logger

from fedpool.site_order import in_order
from fedpool.sites.sites import Sites
from fedpool.tasks.record import RoundRecord


def silent(records: Sequence[RoundRecord]) -> frozenset[str]:
    """Sites that were unreachable or late the last time they were to take part.

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
    """site -> why a round doesn't ask it.

    Empty if too few sites would be left: then the round waits for all of them.

    Args:
        records: of the rounds so far.
        chosen: the round's sites.
        unreachable: site -> why it can't be reached now.
        probes: the chosen sites whose updates would not be used.
        needed: the updates that the round needs; with fewer, it fails.
    """
    without = silent(records)
    found = {site: unreachable[site] for site in in_order(chosen) if site in without and site in unreachable}
    left = set(chosen) - set(probes) - set(found)
    return found if len(left) >= needed else {}


async def unasked(
    records: Sequence[RoundRecord], sites: Sites, chosen: Collection[str], *, probes: Collection[str], needed: int
) -> dict[str, str]:
    """site -> why a round doesn't ask it; looks up unreachable sites, see `left_out`."""
    missing = silent(records) & set(chosen)
    if not missing:
        return {}
    unreachable = await sites.unreachable(in_order(missing))
    found = left_out(records, chosen, unreachable, probes=probes, needed=needed)
    for site, reason in found.items():
        get_run_logger().warning("%s is not asked: %s", site, reason)
    return found


def how_to_resume(record: RoundRecord) -> str:
    """The line that says how to resume a job whose sites were unreachable; empty if none were."""
    away = {entry.site for entry in record.failed if entry.away}
    away |= {entry.site for entry in record.not_asked}
    names = ", ".join(in_order(away - {entry.site for entry in record.accepted}))
    return f"\nonce {names} can be reached again: fedpool job resume {record.job_id}" if names else ""
