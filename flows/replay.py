"""Replays a round with another strategy or without some sites. The job stays as it is."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from fedpool.allowed_code import Permission, by_environment
from fedpool.arrays import torch_block
from fedpool.errors import RecipeError, RoundError
from fedpool.flows.expected import expected
from fedpool.flows.fedavg import FedAvg
from fedpool.flows.staging import num_trained
from fedpool.flows.stored import recipe_of
from fedpool.paths import JobPaths
from fedpool.site_order import in_order
from fedpool.sites.site_round import read_delivery
from fedpool.store import Store
from fedpool.tasks.aggregate import Before, aggregate
from fedpool.tasks.choose_aggregator import Given, chosen
from fedpool.tasks.committed import Committed
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, counting_in, judge
from fedpool.tasks.guarded import strategy_of
from fedpool.tasks.job_record import JobRecord
from fedpool.tasks.record import AcceptedEntry, RoundRecord, stored_records
from fedpool.tasks.used import first_weights
from fedpool.tensors import Tensors, blocks_of


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result of a replay.

    Attributes:
        round: the round that was replayed.
        sites: the sites whose updates were used.
        sha256: of the resulting model.
        moved: L2 distance from the round's global model to the committed next one, over all
            parameters.
        distance: L2 distance from the committed model to the replayed one.
    """

    round: int
    sites: list[str]
    sha256: str
    moved: float
    distance: float


def replay_round(
    store: Store,
    job_id: str,
    target: Path,
    *,
    round: int | None = None,
    strategy: Given | None = None,
    leave_out: Collection[str] = (),
    allow: Permission = by_environment,
) -> Replayed:
    """Aggregate the accepted updates of a round again.

    Args:
        target: file to write the model to; it must not exist.
        round: None for the job's last training round.
        strategy: an aggregator as in a recipe: a name, or for example `Krum(num_byzantine=2)`; None
            for the recipe's own strategy.
        leave_out: sites whose updates are left out.
        allow: called before running code that came with the job; see `recipe_of`.

    Raises:
        ConfigError: the job's code may not be run.
        RecipeError: the aggregator or a site is unknown, or no update is left.
        RoundError: the round is not committed, or its updates were not kept.
        IntegrityError: an update, a model or a state doesn't match its record.
    """
    other = None if strategy is None else FedAvg(chosen(strategy))
    recipe, paths = recipe_of(job_id, store, allow=allow), JobPaths(job_id)
    record = _training_round(store, job_id, num_trained(store, job_id) - 1 if round is None else round)
    assert record.next_global is not None, "a training round makes a model"
    number = record.round
    job = JobRecord.read(store, paths.job)
    own = strategy_of(recipe, len(job.sites))
    models = Committed(store)
    base = models.tensors(paths.global_model(number), record.base)
    wanted = expected(recipe, own, job_id, number, "train", record.base, base, job.holes, job.arithmetic)

    def wanted_of(earlier: int) -> Expected:
        head = RoundRecord.read(store, paths.record(earlier)).base
        model = models.tensors(paths.global_model(earlier), head)
        return expected(recipe, own, job_id, earlier, "train", head, model, job.holes, job.arithmetic)

    updates = _judged_again(store, record, wanted, wanted_of, leave_out)
    earlier = list(islice(stored_records(store, job_id), number))
    scratch, state_target = Store(target.absolute().parent), f".{target.name}.state"
    scratch.block_elements = store.block_elements  # those of the checked updates and models
    try:
        digest = aggregate(
            own if other is None else other,
            store=scratch,
            before=Before(
                base,
                _state(store, models, paths, number),
                number,
                holes=job.holes or frozenset(),
                weights=first_weights(earlier, recipe.aggregation_weights),
            ),
            updates=updates,
            factors=recipe.aggregation_weights,
            target=target.name,
            state_target=state_target,
            arithmetic=job.arithmetic,
        ).model
    finally:
        scratch.remove(state_target)
    committed = models.tensors(paths.global_model(number + 1), record.next_global)
    made = scratch.tensors(target.name, digest.size)
    return Replayed(
        round=number,
        sites=in_order({update.site for update in updates}),
        sha256=digest.sha256,
        moved=_distance(base, committed, store.block_elements),
        distance=_distance(committed, made, store.block_elements),
    )


def _training_round(store: Store, job_id: str, round: int) -> RoundRecord:
    """The record of a round that can be replayed; raises `RoundError` if it made no model."""
    paths = JobPaths(job_id)
    if round < 0:
        raise RoundError(f"job {job_id} has no such training round: give the number of a committed one")
    if not store.exists(paths.record(round)):
        raise RoundError(f"round {round} of job {job_id} is not committed")
    record = RoundRecord.read(store, paths.record(round))
    if record.task != "train" or record.next_global is None:
        raise RoundError(f"round {round} of job {job_id} was not a training round: it made no model")
    return record


def _judged_again(
    store: Store,
    record: RoundRecord,
    wanted: Expected,
    wanted_of: Callable[[int], Expected],
    leave_out: Collection[str],
) -> list[Accepted]:
    """Pass the updates that a round counted, including late ones, through the gate again.

    Args:
        wanted_of: returns the requirements on an earlier round's updates.
        leave_out: sites whose updates are left out.
    """
    there = in_order({entry.site for entry in (*record.accepted, *record.late_accepted)})
    if unknown := in_order(set(leave_out) - set(there)):
        raise RecipeError(
            f"{', '.join(unknown)} sent nothing that round {record.round} used: name some of {', '.join(there)}"
        )
    updates = [_passed(store, entry, wanted) for entry in record.accepted if entry.site not in leave_out]
    for late in record.late_accepted:
        if late.site not in leave_out:
            of_round = wanted_of(late.round)
            outcome = counting_in(record.round, _passed(store, late, of_round), of_round)
            assert isinstance(outcome, Accepted)
            updates.append(outcome)
    if not updates:
        raise RecipeError("no updates are left: leave out fewer sites")
    if not any(update.weight for update in updates):
        raise RecipeError("none of the remaining updates has a weight above 0: leave out fewer sites")
    return updates


def _passed(store: Store, entry: AcceptedEntry, wanted: Expected) -> Accepted:
    """Pass an accepted update through the gate again."""
    if not store.exists(JobPaths(wanted.job_id).update(wanted.round, entry.site, entry.attempt)):
        raise RoundError(f"the updates of round {wanted.round} were not kept (keep_updates), so it cannot be replayed")
    delivery = read_delivery(store, wanted.job_id, wanted.round, entry.site, entry.attempt)
    outcome = judge(store, entry.site, entry.attempt, delivery, wanted)
    if not isinstance(outcome, Accepted):
        raise RoundError(f"{entry.site}'s update has changed ({outcome.reason}): verify the job")
    return outcome


def _state(store: Store, models: Committed, paths: JobPaths, round: int) -> Tensors | None:
    """The strategy's state at the start of a round."""
    said = RoundRecord.read(store, paths.record(round - 1)).state if round > 0 else None
    return models.tensors(paths.state(round - 1), said) if said else None


def _distance(one: Tensors, other: Tensors, block_elements: int) -> float:
    """L2 distance of two models with the same parameters, in float64."""
    total = 0.0
    for name, start, stop in blocks_of(one.spec, block_elements):
        values = (
            torch_block(model.read_block(name, start, stop), model.spec[name].dtype).to(torch.float64)
            for model in (one, other)
        )
        difference = next(values) - next(values)
        difference[~difference.isfinite()] = 0.0  # holes have no difference
        total += torch.dot(difference, difference).item()
    return math.sqrt(total)
