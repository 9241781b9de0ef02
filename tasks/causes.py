"""Explains which sites are missing from a round and why. Equal causes are reported once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedpool.tasks.record import RoundRecord, num_trained


@dataclass(frozen=True, slots=True)
class _Cause:
    """What happened to a site, and why. Equal if only the site and the round named in `why` differ.

    Args:
        kind: `failed`, `rejected`, `probed`, `late`, `folded` (late, and counted in a later round)
            or `not_asked`.
        why: the text that people read.
        alike: the same text, without the names of its site and round.
    """

    kind: str
    why: str = field(compare=False)
    alike: str

    @classmethod
    def of(cls, kind: str, why: str, site: str, number: int) -> "_Cause":
        own_site = rf"(?<![\w.-]){re.escape(site)}(?![\w-]|\.\w)"
        return cls(kind, why, re.sub(own_site, "\0site", re.sub(rf"\bround {number}\b", "\0round", why)))


_FOLDED = _Cause("folded", "", "")


def causes(record: RoundRecord) -> str:
    """Why sites are missing from a round, one paragraph for each cause."""
    sites: dict[_Cause, list[str]] = {}
    for site, cause in _missing(record):
        known = sites.setdefault(cause, [])
        if site not in known:
            known.append(site)
    return "\n".join(
        _sentence(
            cause, ", ".join(who), f"{who[0]}'s update" if len(who) == 1 else f"the updates of {', '.join(who)}", who
        )
        for cause, who in sites.items()
    )


def causes_over_rounds(records: Sequence[RoundRecord]) -> list[str]:
    """Why sites are missing from rounds: a paragraph for each cause, with its sites and rounds."""
    rounds: dict[_Cause, dict[str, list[int]]] = {}
    folded = {(entry.round, entry.site): record.round for record in records for entry in record.late_accepted}
    for record in records:
        for site, missed in _missing(record):
            cause = _FOLDED if missed.kind == "late" and (record.round, site) in folded else missed
            known = rounds.setdefault(cause, {}).setdefault(site, [])
            if record.round not in known:
                known.append(record.round)
    told = []
    for cause, of_site in rounds.items():
        together: dict[str, list[str]] = {}
        for site, numbers in of_site.items():
            together.setdefault(round_numbers(numbers), []).append(site)
        who = ", ".join(f"{', '.join(sites)} ({numbers})" for numbers, sites in together.items())
        what = f"the update of {who}" if len(of_site) == 1 else f"the updates of {who}"
        if cause is _FOLDED:
            later = sorted({folded[number, site] for site, missed_in in of_site.items() for number in missed_in})
            told.append(f"{who} {'was' if len(of_site) == 1 else 'were'} late, counted in {round_numbers(later)}")
        else:
            told.append(_sentence(cause, who, what, list(of_site)))
    return told


def evaluation_error(records: Sequence[RoundRecord]) -> str | None:
    """Why the final model has no score although sites were asked for one; else None."""
    number = num_trained(records)
    if number == len(records) or records[number].metrics:
        return None
    why = causes(records[number])
    return f"round {number} was to score the final model, and no site sent metrics" + (f"\n{why}" if why else "")


def uncounted(record: RoundRecord, factors: Mapping[str, float]) -> str | None:
    """Why a training round left the model unchanged although it accepted updates; None if it
    didn't.

    Args:
        factors: the recipe's `aggregation_weights`.
    """
    accepted = (*record.accepted, *record.late_accepted)
    if record.task != "train" or any(entry.weight and factors.get(entry.site, 1.0) for entry in accepted):
        return None
    sent = [entry.site for entry in accepted if not entry.weight]
    given = [entry.site for entry in accepted if entry.weight]
    why = [f"{', '.join(sent)} sent NUM_STEPS_CURRENT_ROUND 0"] if sent else []
    why += [f"aggregation_weights is 0 for {', '.join(given)}"] if given else []
    return (
        f"every update has weight 0, so the model stays as it is: {'; '.join(why)}. "
        "Send the number of local steps or rows, or leave it out to count as 1"
        if accepted
        else None
    )


def uncounted_over_rounds(records: Sequence[RoundRecord], factors: Mapping[str, float]) -> list[str]:
    """Like `uncounted`, for all rounds: a sentence for each cause."""
    rounds: dict[str, list[int]] = {}
    for record in records:
        if (why := uncounted(record, factors)) is not None:
            rounds.setdefault(why, []).append(record.round)
    return [f"{round_numbers(numbers)}: {why}" for why, numbers in rounds.items()]


def round_numbers(numbers: Sequence[int]) -> str:
    """Ascending round numbers in words: "round 1", "rounds 1-4, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"round {shown}" if len(numbers) == 1 else f"rounds {shown}"


def _missing(record: RoundRecord) -> Iterator[tuple[str, _Cause]]:
    """Every failed attempt to get an update, for the sites without an accepted one."""
    there = {entry.site for entry in record.accepted}
    asked = [(entry.site, "failed", entry.cause) for entry in record.failed]
    asked += [(entry.site, "rejected", f"({entry.code}): {entry.reason}") for entry in record.rejected]
    asked += [(entry.site, "probed", "") for entry in record.probed]
    asked += [(entry.site, "late", "") for entry in record.late]
    asked += [(entry.site, "not_asked", entry.reason) for entry in record.not_asked]
    yield from ((site, _Cause.of(kind, why, site, record.round)) for site, kind, why in asked if site not in there)


def _sentence(cause: _Cause, who: str, update: str, sites: Sequence[str]) -> str:
    """The sentence for one cause.

    Args:
        who: the sites, in words.
        update: their updates, in words.
        sites: their names.
    """
    why = cause.why
    one = len(sites) == 1
    match cause.kind:
        case "failed":
            return f"{who} failed: {why}"
        case "rejected":
            return f"{update} {'was' if one else 'were'} rejected {why}"
        case "not_asked":
            return f"{who} {'was' if one else 'were'} not asked: {why}"
        case "probed":
            return (
                f"{who} is in quarantine: its update was good, and it is let in again"
                if one
                else f"{who} are in quarantine: their updates were good, and they are let in again"
            )
        case _:
            return f"{who} {'was' if one else 'were'} late: the round did not wait for {'it' if one else 'them'}"
