"""Finds the sites in quarantine from the rounds' records, so a resumed job has the same ones."""

from collections.abc import Sequence

from fedpool.tasks.record import RoundRecord


def quarantined(records: Sequence[RoundRecord], max_rejections: int | None) -> frozenset[str]:
    """Sites whose last `max_rejections` updates were all rejected.

    Such a site is still asked, as a probe. An update that passes the gate is not used, but ends the
    quarantine. Rounds in which a site failed, was late or was not asked don't count.

    Args:
        records: of the rounds so far.
        max_rejections: in a row; None for no quarantine.
    """
    if max_rejections is None:
        return frozenset()
    in_a_row: dict[str, int] = {}
    for record in records:
        for good, bad in (
            ((*record.late_accepted, *record.late_probed), record.late_rejected),  # sent for an earlier round
            ((*record.accepted, *record.probed), record.rejected),
        ):
            passed = {entry.site for entry in good}
            for site in {entry.site for entry in bad} - passed:
                in_a_row[site] = in_a_row.get(site, 0) + 1
            for site in passed:
                in_a_row.pop(site, None)
    return frozenset(site for site, count in in_a_row.items() if count >= max_rejections)
