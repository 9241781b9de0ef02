"""What a job does next: pure functions of its recipe and of the rounds that it has committed,
nothing else.

So a job that is resumed goes on as it would have gone on, and whoever verifies a job knows what had
to follow. In order:

1. training, `num_rounds` rounds or until it is stopped early;
2. one round in which sites score the last model, when any site reports metrics or the recipe asks
   for scores, and unless the recipe says otherwise (`final_evaluation`);
3. with `cross_site_eval`, one round in which sites submit their best local models, and one for each
   of the models that are not scored yet, in which all sites score it.
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
    """What a round does.

    Attributes:
        task: what sites are asked.
        owner: whose model they are given: `SERVER`, `SERVER_BEST`, or the site that submitted it.
        origin: the round that a server's model is the start of, or in which a site submitted its
            own.
        model: digest of the model; None for the newest global model.
        everyone: whether all sites are asked and waited for, whatever the recipe says of sampling
            and quorum.
        min_answers: accepted updates without which the job fails; with 0, sites that are missing
            leave a hole.
    """

    task: Task
    owner: str
    origin: int
    model: Digest | None = None
    everyone: bool = False
    min_answers: int = 0


def next_step(recipe: Recipe, records: Sequence[RoundRecord]) -> tuple[Step | None, str | None]:
    """What the next round does, None at the job's end; and what stopped the training early, if
    anything did.
    """
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
        # Where nothing is trained this is the job's purpose: without answers it has failed.
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
    """How many rounds the job will have in the end, as far as is known: nothing stops it, and
    every site has a model.
    """
    training, scoring = _split(records)
    count = _num_training(recipe, records) + _scores_the_last(recipe, training)
    if recipe.cross_site_eval:
        count += 1 + (len(scoring[1].models or ()) if len(scoring) > 1 else num_sites)
    return count


def asks_everyone(recipe: Recipe, records: Sequence[RoundRecord], number: int) -> bool:
    """Whether a round to come will ask all sites, as far as is known now."""
    return recipe.cross_site_eval and number >= _num_training(recipe, records)


def best_model(recipe: Recipe, records: Sequence[RoundRecord]) -> int:
    """The round that the best global model is the start of, by its own score; the final one when
    none is scored.

    A model that is not scored, such as the final one where nobody evaluates it, is not the best one
    as long as another is.
    """
    trained = len(_split(records)[0])
    best = best_round(
        [record.metrics.get(recipe.key_metric) for record in records[: trained + 1]], recipe.key_metric_mode
    )
    return trained if best is None else best


def unscored_best(recipe: Recipe, records: Sequence[RoundRecord], sites: Collection[str]) -> SubmittedModel | None:
    """The best global model as an entry of `models`, when it is not the final one and some site
    has not scored it.
    """
    best = best_model(recipe, records)
    record = records[best]
    if record.task != "train" or {entry.site for entry in record.accepted} >= set(sites):
        return None
    return SubmittedModel(owner=SERVER_BEST, round=best, sha256=record.base.sha256, size=record.base.size)


def _split(records: Sequence[RoundRecord]) -> tuple[Sequence[RoundRecord], Sequence[RoundRecord]]:
    """The rounds that trained, and those after them."""
    trained = num_trained(records)
    return records[:trained], records[trained:]


def _num_training(recipe: Recipe, records: Sequence[RoundRecord]) -> int:
    training, scoring = _split(records)
    is_over = bool(scoring) or (bool(training) and _stops(recipe, training) is not None)
    return len(training) if is_over else recipe.num_rounds


def _scores_the_last(recipe: Recipe, training: Sequence[RoundRecord]) -> bool:
    """Sites score the model that they receive: the last one needs a round of its own, when
    scores are to be had.
    """
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
