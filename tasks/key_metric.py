"""Whether sites report the metrics that a recipe goes by: a misspelt name stops nothing, and
makes the last model the best.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

from fedpool.conditions import parse_condition
from fedpool.fields import nearest
from fedpool.recipe import Recipe
from fedpool.tasks.job_record import JobRecord
from fedpool.tasks.record import RoundRecord


@dataclass(frozen=True, slots=True)
class MetricRules:
    """What a recipe asks of metrics.

    `given` names the fields that the user chose; None when nobody knows, as of a job of an earlier
    version.
    """

    key_metric: str
    stop_cond: str | None
    patience: int | None
    given: Collection[str] | None

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The rules of a recipe."""
        return cls(recipe.key_metric, recipe.stop_cond, recipe.patience, recipe.given)

    @classmethod
    def stored(cls, job: JobRecord) -> Self:
        """The rules of a job, as its `job.json` has them."""
        fields = job.fields
        return cls(fields["key_metric"], fields.get("stop_cond"), fields.get("patience"), job.given)


@dataclass(frozen=True, slots=True)
class Gap:
    """A metric that is gone by, and that no site reports; `is_fatal` when the user has asked for
    what depends on it.
    """

    text: str
    is_fatal: bool


def metric_gap(rules: MetricRules, records: Sequence[RoundRecord]) -> Gap | None:
    """What is missing from the first training round in which any site reported a metric; None when
    nothing is.

    A recipe that says nothing about metrics may also have none at all.

    Args:
        records: of the rounds that are committed.
    """
    training = [record for record in records if record.task == "train"]
    scored = next((record for record in training if _reported(record)), None)
    needs = _needs(rules)
    if not training or (scored is None and not needs):
        return None
    record = scored or training[0]
    names = _reported(record)
    for what, metric in needs.items():
        if metric not in names:
            return Gap(f"{what} needs the metric {metric!r}. {_who_reported(metric, record)}", is_fatal=True)
    if rules.key_metric not in names:
        said = _who_reported(rules.key_metric, record)
        text = f"the key metric {rules.key_metric!r} is missing, so the last model counts as the best. {said}"
        return Gap(text, is_fatal=False)
    return None


def _needs(rules: MetricRules) -> dict[str, str]:
    """What the user has asked for -> the metric that it needs."""
    given = rules.given
    if given is None:  # a job of an earlier version goes on as it began
        return {}
    needs = {f"stop_cond={rules.stop_cond!r}": parse_condition(rules.stop_cond).metric} if rules.stop_cond else {}
    if rules.patience:
        needs[f"patience={rules.patience}"] = rules.key_metric
    if "key_metric" in given:
        needs[f"key_metric={rules.key_metric!r}"] = rules.key_metric
    return needs


def _reported(record: RoundRecord) -> set[str]:
    """Names of the metrics that sites sent; one that was not a finite number was sent, too."""
    return {name for entry in record.accepted for name in entry.metrics}


def _who_reported(metric: str, record: RoundRecord) -> str:
    names = sorted(_reported(record))
    logged = {name for entry in record.accepted for name in entry.logged}
    what = f"the metrics {', '.join(names)}" if len(names) > 1 else f"the metric {names[0]}" if names else "no metric"
    said = f"In round {record.round} sites reported {what}"
    if (meant := nearest(metric, names)) is not None:
        return f"{said}: did you mean {meant}? Give the name that the script sends"
    if metric in logged:
        return f"{said}, though they logged {metric}: send it as FLModel(metrics={{{metric!r}: ...}})"
    return f"{said}: send FLModel(metrics={{{metric!r}: ...}}), or give a name that the script sends"
