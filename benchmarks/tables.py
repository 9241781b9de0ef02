"""The tables that simulation.py and poc.py print."""

import statistics
from collections.abc import Iterable, Sequence

from measure import Case, Sample

SCORE_TOLERANCE = 0.01
"""Allows for a different order of summing, but not for a different weight, seed or split."""


def report(case: Case, results: dict[str, list[Sample]]) -> Iterable[str]:
    """The lines of a case's table: medians over the runs, and their ratios to fedpool's."""
    yield f"\n{case.title}: {case.num_sites} sites, {case.num_rounds} round{'s' * (case.num_rounds > 1)}\n"
    unit = "ms a site" if case.num_rounds == 1 else "round s"
    reference = _figures(case, results.get("fedpool", []))
    rows: list[tuple[str, ...]] = [
        ("engine", "total s", "x", "cpu s", "x", unit, "x", "peak PSS GB", "x", "processes", "score")
    ]
    for name, samples in results.items():
        figures = _figures(case, samples)
        cells = [name]
        for key, digits in (("total", 1), ("cpu", 1), ("each", 3 if case.num_rounds > 1 else 1), ("memory", 2)):
            ratio = f"{figures[key] / reference[key]:.2f}" if figures and reference else "-"
            cells += [f"{figures[key]:.{digits}f}" if figures else "failed", ratio]
        last = [f"{samples[-1].num_processes}", f"{samples[-1].score:.4f}"] if samples else ["-", "-"]
        rows.append((*cells, *last))
    yield from _table(rows)
    scores = [sample.score for samples in results.values() for sample in samples]
    if scores and max(scores) - min(scores) > SCORE_TOLERANCE:
        yield "\nThe scores differ: the engines did not do the same work."


def report_growth(
    few: Case, few_results: dict[str, list[Sample]], many: Case, many_results: dict[str, list[Sample]]
) -> Iterable[str]:
    """How peak memory and total time grow with the number of sites."""
    yield f"\nfrom {few.num_sites} to {many.num_sites} sites\n"
    rows = [("engine", "peak PSS x", "ms a further site")]
    for name, samples in few_results.items():
        if samples and many_results.get(name):
            before, after = _medians(samples), _medians(many_results[name])
            each_ms = 1000 * (after[0] - before[0]) / (many.num_sites - few.num_sites)
            rows.append((name, f"{after[1] / before[1]:.2f}", f"{each_ms:.1f}"))
    yield from _table(rows)


def report_overheads(results: dict[Case, dict[str, list[Sample]]], *, training_s: float) -> Iterable[str]:
    """The overhead of a round. The median excludes the first round, which starts the sites'
    scripts.
    """
    header = ("engine", "sites", "overhead s", "worst", "first round", "start s", "total s", "processes", "PSS GB")
    rows: list[tuple[str, ...]] = [(*header, "score", "other cores")]
    wrong = False
    for case, engines in results.items():
        for name, samples in engines.items():
            if not samples:
                rows.append((name, f"{case.num_sites}", "failed", *["-"] * (len(rows[0]) - 3)))
                continue
            overheads = [second - training_s for sample in samples for second in sample.round_s[1:]]
            total_s, peak_bytes = _medians(samples)
            cells = (
                f"{statistics.median(overheads):.2f}",
                f"{max(overheads):.2f}",
                f"{statistics.median(sample.round_s[0] for sample in samples) - training_s:.2f}",
                f"{statistics.median(sample.start_s for sample in samples):.1f}",
                f"{total_s:.1f}",
                f"{samples[-1].num_processes}",
                f"{peak_bytes / 1e9:.2f}",
                f"{samples[-1].score:.2f}",
                f"{statistics.median(sample.other_cores for sample in samples):.2f}",
            )
            rows.append((name, f"{case.num_sites}", *cells))
            wrong |= any(abs(sample.score - (case.num_rounds - 1)) > SCORE_TOLERANCE for sample in samples)
    yield from _table(rows)
    if wrong:
        yield "\nA score differs from the number of rounds: an engine did not do the work."


def _figures(case: Case, samples: Sequence[Sample]) -> dict[str, float]:
    """Medians over the runs; empty if there were none."""
    if not samples:
        return {}
    total_s, peak_bytes = _medians(samples)
    rounds = [second for sample in samples for second in sample.round_s]
    return {
        "total": total_s,
        "cpu": statistics.median(sample.cpu_s for sample in samples),
        "each": statistics.median(rounds) if rounds else 1000 * total_s / case.num_sites,
        "memory": peak_bytes / 1e9,
    }


def _medians(samples: Sequence[Sample]) -> tuple[float, float]:
    """Total seconds and peak bytes."""
    return statistics.median(s.total_s for s in samples), statistics.median(s.peak_bytes for s in samples)


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """A Markdown table, with names aligned left and numbers right."""
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (rows[0], rule, *rows[1:]):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield f"| {' | '.join(cells)} |"
