"""The cross-site matrix: every model scored on every site's data, from the rounds' records."""

from collections.abc import Mapping, Sequence
from operator import itemgetter

from pydantic import TypeAdapter, ValidationError

from fedpool.errors import IntegrityError
from fedpool.model import NUM_STEPS
from fedpool.recipe import SERVER, SERVER_BEST
from fedpool.site_order import by_site, in_order, natural_key
from fedpool.store import Store
from fedpool.tasks.metrics import mean_metrics
from fedpool.tasks.record import AcceptedEntry, RoundRecord

Matrix = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""data site -> owner of the model -> metrics, and their weight under `NUM_STEPS_CURRENT_ROUND`."""

_MATRIX = TypeAdapter(dict[str, dict[str, dict[str, float | None]]])


def cross_site_matrix(records: Sequence[RoundRecord], best: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """The matrix of a job's rounds. If a site hasn't scored a model, it has no entry there.

    Args:
        best: the round that starts from the best global model. If that is a training round, its
            scores count, unless the model was scored again.
    """
    scored = [record for record in records if record.task == "evaluate"]
    found: dict[str, dict[str, dict[str, float | None]]] = {site: {} for record in scored for site in record.sites}
    whose = [(record.model.owner, record) for record in scored]
    if records[best].task == "train" and not any(owner == SERVER_BEST for owner, _ in whose):
        whose.append((SERVER_BEST, records[best]))
    for owner, record in whose:
        for entry in record.accepted:
            if entry.metrics:
                row = found.setdefault(entry.site, {})
                row[owner] = site_scores(entry)
    return {site: found[site] for site in in_order(found)}


def read_matrix(store: Store, path: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """The matrix of a job from its `cross_site.json`.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it contains something else.
    """
    try:
        matrix = _MATRIX.validate_json(store.read_bytes(path), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[0]
        where = "".join(f"{part}: " for part in found["loc"])
        raise IntegrityError(f"{store.full(path)} is not a table of scores: {where}{found['msg']}") from None
    for site, row in matrix.items():
        if without := [owner for owner, scores in row.items() if NUM_STEPS not in scores]:
            raise IntegrityError(
                f"{store.full(path)} is not a table of scores: {site}: {without[0]}: {NUM_STEPS} is missing"
            )
    return matrix


def site_scores(entry: AcceptedEntry) -> dict[str, float | None]:
    """The metrics of a model in a record's entry of an accepted update, and their weight."""
    return {**entry.metrics, NUM_STEPS: entry.metrics_weight}


def owners(matrix: Matrix) -> list[str]:
    """The owners of the models in a matrix: the server first, then the sites by name."""
    found = {owner for row in matrix.values() for owner in row}
    return sorted(found, key=lambda owner: (owner != SERVER, owner != SERVER_BEST, natural_key(owner)))


def matrix_metrics(matrix: Matrix, *, first: str) -> list[str]:
    """Names of the metrics in a matrix, sorted, but starting with `first` if it is one of them."""
    found = {name for row in matrix.values() for scores in row.values() for name in scores} - {NUM_STEPS}
    return sorted(found, key=lambda name: (name != first, name))


def pooled(matrix: Matrix, metric: str) -> dict[str, float]:
    """owner -> weighted mean of a metric over the sites that report it."""
    return {
        owner: mean[metric]
        for owner in owners(matrix)
        if metric
        in (mean := mean_metrics((_weight(row[owner]), row[owner]) for row in matrix.values() if owner in row))
    }


def matrix_rows(matrix: Matrix, metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per data site, then the pooled scores; a column per model."""
    columns = owners(matrix)
    rows = [
        [site, *(_shown(row.get(owner, {}).get(metric)) for owner in columns)]
        for site, row in by_site(matrix.items(), itemgetter(0))
    ]
    means = pooled(matrix, metric)
    return [metric, *columns], [*rows, ["all", *(_shown(means.get(owner)) for owner in columns)]]


def _weight(scores: Mapping[str, float | None]) -> float:
    return scores[NUM_STEPS] or 0.0


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
