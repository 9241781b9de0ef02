"""A job in the terminal: a progress line while it runs, and a table of its rounds at the end."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from fedpool.deployments.endings import tell_endings
from fedpool.deployments.handle import JobStatus, Progress, Run
from fedpool.errors import FedpoolError, StoreError
from fedpool.recipe import Recipe
from fedpool.tasks.findings import findings
from fedpool.tasks.key_metric import MetricRules, metric_gap
from fedpool.tasks.matrix import Matrix, matrix_metrics, matrix_rows
from fedpool.tasks.report.tables import report_rows

_POLL_S = 0.2


def show(run: Run, recipe: Recipe, num_sites: int, console: Console) -> None:
    """Show a job's progress until it ends, and its outcome. Ctrl-C cancels the job first.

    Raises:
        FedpoolError: the job could not begin.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        watch(run, recipe, num_sites, console)
    except KeyboardInterrupt:
        console.print("cancelling ...")
        run.abort()
        run.wait()
        summarize(run, recipe, console)
        raise
    run.raise_if_never_begun()
    summarize(run, recipe, console)


def watch(run: Run, recipe: Recipe, num_sites: int, console: Console) -> None:
    """Show a job's progress: round, sites done, key metric, elapsed time.

    If the output is not a terminal, print a line per round instead.
    """
    asked = min(recipe.clients_per_round or num_sites, num_sites)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sites {task.fields[metric]}"),
        TimeElapsedColumn(),
    )
    shown, warned = 0, False
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(f"{recipe.name} starting", total=asked, metric="")
        while not run.wait(_POLL_S):
            try:
                progress = run.get_progress()
            except StoreError:  # the store does not answer or refuses access; the job may go on
                continue
            number = min(progress.num_committed, recipe.num_rounds)
            step = (
                "scoring" if progress.num_committed >= recipe.num_rounds else f"round {number + 1}/{recipe.num_rounds}"
            )
            bars.update(
                bar,
                description=f"{recipe.name} {step}",
                completed=progress.num_answered,
                metric=_metric(progress, recipe),
            )
            if progress.last_record is not None and not warned:
                gap = metric_gap(MetricRules.of(recipe), [progress.last_record])
                if gap is not None and not gap.is_fatal:
                    warned = True
                    print_findings([gap.text], console)
            if not console.is_terminal and progress.num_committed > shown:
                shown = progress.num_committed
                console.print(done_line(recipe.name, shown, _metric(progress, recipe)), highlight=False)


def done_line(name: str, num_rounds: int, metric: str) -> str:
    """A line about a job's progress.

    Args:
        name: the recipe's name.
        num_rounds: number of committed rounds.
        metric: name and value of a metric, or empty.
    """
    return f"{name}: {num_rounds} {'round' if num_rounds == 1 else 'rounds'} done {metric}".rstrip()


def summarize(run: Run, recipe: Recipe, console: Console) -> None:
    """Print how the job ended: a table of its rounds and the paths of its models, or the error."""
    status = run.get_status()
    if status is not JobStatus.COMPLETED:
        try:
            run.get_result(0)
        except FedpoolError as error:
            console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return
    result = run.get_result(0)
    header, rows = report_rows(result.records)
    table = Table(
        title=f"{recipe.name}: a round's metrics are the score of the model that it started from", title_justify="left"
    )
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for metric in matrix_metrics(result.cross_site or {}, first=recipe.key_metric)[:1]:
        console.print(cross_site_table(result.cross_site or {}, metric))
    if result.stopped_by:
        console.print(f"stopped early: {result.stopped_by}", highlight=False)
    if result.evaluation_error:
        print_findings(result.evaluation_error.splitlines()[:1], console)
    print_findings(findings(MetricRules.of(recipe), recipe.aggregation_weights, result.records), console)
    print_findings(tell_endings(result.endings), console)
    final = result.metrics[result.num_rounds] if len(result.metrics) > result.num_rounds else {}
    console.print(f"final model{_scores(final)}: {result.path}", highlight=False, soft_wrap=True)
    if result.best_round != result.num_rounds:
        best = result.metrics[result.best_round]
        console.print(f"best model{_scores(best)}: {result.best_path}", highlight=False, soft_wrap=True)


def print_findings(told: Sequence[str], console: Console) -> None:
    """Print findings about the job that its table does not show."""
    for finding in told:
        console.print(finding, style="yellow", highlight=False, markup=False, soft_wrap=True)


def cross_site_table(matrix: Matrix, metric: str) -> Table:
    """A table of one metric, for every model at every site."""
    header, rows = matrix_rows(matrix, metric)
    table = Table(title=f"{metric} of every model (columns) on the data of every site (rows)", title_justify="left")
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _metric(progress: Progress, recipe: Recipe) -> str:
    metrics: Mapping[str, float] = progress.last_record.metrics if progress.last_record else {}
    return f"{recipe.key_metric} {metrics[recipe.key_metric]:.4f}" if recipe.key_metric in metrics else ""


def _scores(metrics: Mapping[str, float]) -> str:
    return f" ({', '.join(f'{name} {value:.4f}' for name, value in metrics.items())})" if metrics else ""
