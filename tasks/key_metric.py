"""Checks that sites report the metrics that a recipe uses.

With a misspelt name, nothing would stop the job early, and the last model would count as the best.
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
    """The fields of a recipe that concern metrics.

    `given` names the fields that the user chose; None if unknown, as for jobs of earlier versions.
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
        """The rules of a job according to its `job.json`."""
        fields = job.fields
        return cls(fields["key_metric"], fields.get("stop_cond"), fields.get("patience"), job.given)


@dataclass(frozen=True, slots=True)
class Gap:
    """A metric that a rule uses but no site reports; `is_fatal` if the user asked for that rule."""

    text: str
    is_fatal: bool


def metric_gap(rules: MetricRules, records: Sequence[RoundRecord]) -> Gap | None:
    """The metric that the first training round with metrics lacks; None if it lacks none.

    A recipe that sets none of the fields about metrics may do without any.

    Args:
        records: of the committed rounds.
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
    """Setting that the user chose -> the metric that it needs."""
    given = rules.given
    if given is None:  # a job of an earlier version continues as it began
        return {}
    needs = {f"stop_cond={rules.stop_cond!r}": parse_condition(rules.stop_cond).metric} if rules.stop_cond else {}
    if rules.patience:
        needs[f"patience={rules.patience}"] = rules.key_metric
    if "key_metric" in given:
        needs[f"key_metric={rules.key_metric!r}"] = rules.key_metric
    return needs


def _reported(record: RoundRecord) -> set[str]:
    """Names of the metrics that sites sent, including those that weren't finite numbers."""
    return {name for entry in record.accepted for name in entry.metrics}


def _who_reported(metric: str, record: RoundRecord) -> str:
    names = sorted(_reported(record))
    logged = {name for entry in record.accepted for name in entry.logged}
    what = f"the metrics {', '.join(names)}" if len(names) > 1 else f"the metric {names[0]}" if names else "no metric"
    said = f"In round {record.round} sites reported {what}"
    if (meant := nearest(metric, names)) is not None:
        return f"{said}: the script sends {meant!r}; give that name or correct the script"
    if metric in logged:
        return f"{said}, although they logged {metric}: send it as FLModel(metrics={{{metric!r}: ...}})"
    return f"{said}: send FLModel(metrics={{{metric!r}: ...}}), or give a name that the script sends"
