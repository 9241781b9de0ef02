"""Shows rounds as tables and a job as a report, for the UI and the terminal."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedpool.recipe import SERVER
from fedpool.site_order import by_site
from fedpool.tasks.job_record import JobResult
from fedpool.tasks.record import RoundRecord

MAX_METRICS = 50
"""Columns for metrics in a table. The names are those that sites choose, 1,000 each."""


def metric_names(records: Sequence[RoundRecord]) -> list[str]:
    """Names of the metrics and logged scalars of some rounds, sorted; if there are too many for a
    table, those that most sites have reported most often.
    """
    names = {name for record in records for name in (*record.metrics, *record.logged)}
    if len(names) <= MAX_METRICS:
        return sorted(names)
    entries = [entry for record in records for entry in record.accepted]
    reported = Counter(name for entry in entries for name in {*entry.metrics, *entry.logged})
    return sorted(sorted(names, key=lambda name: (-reported[name], name))[:MAX_METRICS])


def values(record: RoundRecord) -> dict[str, float]:
    """Metrics and logged scalars of a round; a metric wins over a scalar with the same name."""
    return {**record.logged, **record.metrics}


def round_table(record: RoundRecord) -> list[dict[str, Any]]:
    """One row per site: site, state, examples (its weight), metrics and scalars, seconds, bytes."""
    names = metric_names([record])
    rows: list[dict[str, Any]] = []
    for entry in record.accepted:
        own = {**entry.logged, **entry.metrics}
        shown = {name: "" if own.get(name) is None else f"{own[name]:.4f}" for name in names}
        state = "accepted" if entry.weight or record.task != "train" else "accepted, but its weight is 0"
        rows.append(
            {"site": entry.site, "state": state, "examples": f"{entry.weight:g}", **shown}
            | {"seconds": f"{entry.seconds:.2f}", "bytes": str(entry.size)}
        )
    rows += [{"site": entry.site, "state": f"rejected: {_first_line(entry.reason)}"} for entry in record.rejected]
    rows += [{"site": entry.site, "state": f"failed: {_first_line(entry.cause)}"} for entry in record.failed]
    rows += [{"site": entry.site, "state": f"not asked: {entry.reason}"} for entry in record.not_asked]
    rows += [{"site": entry.site, "state": "late"} for entry in record.late]
    rows += [{"site": entry.site, "state": "probed"} for entry in record.probed]
    rows += late_rows(record)
    return by_site(rows, lambda row: str(row["site"]))


def late_rows(record: RoundRecord) -> list[dict[str, Any]]:
    """One row per update of an earlier round that arrived in this one."""
    rows: list[dict[str, Any]] = []
    for entry in record.late_accepted:
        state = f"late from round {entry.round}, counted in round {record.round} (staleness {entry.staleness})"
        shown = {"examples": f"{entry.weight:g}", "seconds": f"{entry.seconds:.2f}", "bytes": str(entry.size)}
        rows.append({"site": entry.site, "state": state, **shown})
    for refused in record.late_rejected:
        state = f"late from round {refused.round}, rejected: {_first_line(refused.reason)}"
        rows.append({"site": refused.site, "state": state})
    rows += [{"site": entry.site, "state": f"late from round {entry.round}, probed"} for entry in record.late_probed]
    return rows


def task_and_owner(record: RoundRecord) -> str:
    """The task of a round; if it scored a site's model, also the owner."""
    owner = record.model.owner
    return record.task if owner == SERVER else f"{record.task} {owner}"


def report_rows(records: Sequence[RoundRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and one row per round: round, task, accepted of asked, metrics, seconds."""
    names = metric_names(records)
    header = ["round", "task", "sites", *names, "seconds"]
    rows = []
    for record in records:
        known = values(record)
        rows.append(
            [
                str(record.round),
                task_and_owner(record),
                f"{len(record.accepted)}/{len(record.sites)}"
                + (f" + {late} late" if (late := len(record.late_accepted)) else ""),
                *(f"{known[name]:.4f}" if name in known else "" for name in names),
                f"{record.timings.round_s:.2f}",
            ]
        )
    return header, rows


def final_report(
    name: str,
    result: JobResult,
    records: Sequence[RoundRecord],
    *,
    pictures: Sequence[str] = (),
    findings: Sequence[str] = (),
) -> str:
    """The job in markdown: outcome, final and best model, the table of rounds.

    Args:
        pictures: keys of the artifacts that show the metrics over the rounds.
        findings: facts that the table doesn't show; see `fedpool.tasks.findings`.
    """
    lines = [f"# {name}: {result.status.lower()}", ""]
    if result.error:
        lines += ["```", result.error, "```", ""]
    for which, model in (("final", result.final), ("best", result.best)):
        known = list(model.metrics.items())
        scores = ", ".join(f"{key} {value:.4f}" for key, value in known[:MAX_METRICS]) or "not scored"
        lines.append(f"- **{which} model**: the start of round {model.round}, {scores}: `{model.path}`")
    if result.stopped_by:
        lines.append(f"- stopped early: {result.stopped_by}")
    if result.evaluation_error:
        lines += [
            "- **the final model is not scored**:",
            "",
            "```",
            result.evaluation_error.splitlines()[0],
            "```",
            "",
        ]
    for site, how in result.endings.items():
        lines += [f"- **{site} failed after its last round**:", "", "```", how, "```", ""]
    if pictures:
        lines.append(f"- curves: the artifacts {', '.join(f'`{key}`' for key in pictures)}")
    header, rows = report_rows(records)
    lines += ["", "The metrics of a round are the score of the model that it started from.", ""]
    # Sites choose the names of their metrics.
    header = [" ".join(cell.split()).replace("|", "\\|") for cell in header]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    if told := untold(findings, result.error):
        lines += ["", "```", "\n".join(told), "```"]
    return "\n".join(lines)


def _first_line(text: str) -> str:
    return text.splitlines()[0]


def untold(findings: Sequence[str], error: str | None) -> list[str]:
    """The findings that the job's error doesn't already mention."""
    return [finding for finding in findings if finding not in (error or "")]
