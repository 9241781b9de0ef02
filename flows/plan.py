"""The next step of a job: pure functions of its recipe and its committed rounds.

So a resumed job continues exactly as it would have, and verifying a job can tell what had to
follow. In order:

1. training, `num_rounds` rounds or until it is stopped early;
2. one round in which sites score the last model, if any site reports metrics or the recipe asks
   for scores, unless the recipe turns it off (`final_evaluation`);
3. with `cross_site_eval`, one round in which sites submit their best local models, and one for each
   model that isn't scored yet, in which all sites score it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedpool.messages import Task
from fedpool.recipe import SERVER, SERVER_BEST, Recipe
from fedpool.tasks.metrics import best_round, has_stalled
from fedpool.tasks.record import RoundRecord, SubmittedModel, num_trained
from fedpool.tensors import Digest


@dataclass(frozen=True, slots=True)
class Step:
    """The assignment of a round.

    Attributes:
        task: of the sites.
        owner: of the model that they get: `SERVER`, `SERVER_BEST`, or the site that submitted it.
        origin: for a server's model, the round that starts from it; for a site's, the round in
            which it was submitted.
        model: digest of the model; None for the newest global model.
        everyone: whether to ask and wait for all sites, whatever the recipe says about sampling and
            quorum.
        min_answers: number of accepted updates that the job needs; with fewer, it fails. If it is
            0, missing sites leave gaps.
    """

    task: Task
    owner: str
    origin: int
    model: Digest | None = None
    everyone: bool = False
    min_answers: int = 0


def next_step(recipe: Recipe, records: Sequence[RoundRecord]) -> tuple[Step | None, str | None]:
    """The next step, None at the job's end; and what stopped the training early, if anything."""
    training, scoring = _split(records)
    stopped_by = None
    if len(training) < recipe.num_rounds:
        stopped_by = _stops(recipe, training) if training else None
        if stopped_by is None:
            return Step("train", SERVER, len(training), min_answers=recipe.min_clients), None
    trained = len(training)
    if not scoring:
        if not _scores_the_last(recipe, training):
            return None, stopped_by
        # Without training, scores are the job's purpose: it fails without answers.
        needed = 0 if recipe.num_rounds else recipe.min_clients
        return Step("evaluate", SERVER, trained, everyone=recipe.cross_site_eval, min_answers=needed), stopped_by
    if not recipe.cross_site_eval:
        return None, stopped_by
    if len(scoring) == 1:
        return Step("submit_model", SERVER, trained, everyone=True), stopped_by
    models = scoring[1].models or ()
    if len(scoring) - 2 == len(models):
        return None, stopped_by
    model = models[len(scoring) - 2]
    return Step("evaluate", model.owner, model.round, model.digest, everyone=True), stopped_by


def num_expected(recipe: Recipe, records: Sequence[RoundRecord], num_sites: int) -> int:
    """The expected number of rounds, if nothing stops the job and every site has a model."""
    training, scoring = _split(records)
    count = _num_training(recipe, records) + _scores_the_last(recipe, training)
    if recipe.cross_site_eval:
        count += 1 + (len(scoring[1].models or ()) if len(scoring) > 1 else num_sites)
    return count


def asks_everyone(recipe: Recipe, records: Sequence[RoundRecord], number: int) -> bool:
    """Whether a future round will ask all sites, as far as is known now."""
    return recipe.cross_site_eval and number >= _num_training(recipe, records)


def best_model(recipe: Recipe, records: Sequence[RoundRecord]) -> int:
    """The round that starts from the best global model, by its score; the final one if none has a
    score.

    A model without a score, such as a final model that isn't evaluated, is not the best one as long
    as another has a score.
    """
    trained = len(_split(records)[0])
    best = best_round(
        [record.metrics.get(recipe.key_metric) for record in records[: trained + 1]], recipe.key_metric_mode
    )
    return trained if best is None else best


def unscored_best(recipe: Recipe, records: Sequence[RoundRecord], sites: Collection[str]) -> SubmittedModel | None:
    """The best global model as an entry of `models`, if a site still has to score it."""
    best = best_model(recipe, records)
    record = records[best]
    if record.task != "train" or {entry.site for entry in record.accepted} >= set(sites):
        return None
    return SubmittedModel(owner=SERVER_BEST, round=best, sha256=record.base.sha256, size=record.base.size)


def _split(records: Sequence[RoundRecord]) -> tuple[Sequence[RoundRecord], Sequence[RoundRecord]]:
    """The training rounds, and those after them."""
    trained = num_trained(records)
    return records[:trained], records[trained:]


def _num_training(recipe: Recipe, records: Sequence[RoundRecord]) -> int:
    training, scoring = _split(records)
    is_over = bool(scoring) or (bool(training) and _stops(recipe, training) is not None)
    return len(training) if is_over else recipe.num_rounds


def _scores_the_last(recipe: Recipe, training: Sequence[RoundRecord]) -> bool:
    """Whether the last model needs an evaluation round, as sites only score models they receive."""
    if recipe.num_rounds == 0 or recipe.cross_site_eval:
        return True
    return recipe.final_evaluation and any(record.metrics for record in training)


def _stops(recipe: Recipe, training: Sequence[RoundRecord]) -> str | None:
    metrics = training[-1].metrics
    if (condition := recipe.stop_condition) and condition.holds(metrics):
        return f"{condition} (it was {metrics[condition.metric]:.6g} at the start of round {training[-1].round})"
    scores = [record.metrics.get(recipe.key_metric) for record in training]
    if recipe.patience and has_stalled(scores, recipe.key_metric_mode, recipe.patience):
        return f"{recipe.key_metric} did not improve in {recipe.patience} rounds"
    return None
