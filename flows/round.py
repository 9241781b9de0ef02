"""`federated_round`: one global step, one flow run, named "<job name> round 3".

Its run is created (`fedpool.flows.round_run`) while an earlier round still trains, because a short round takes no longer than
that does, and waits for its turn.
Fans out one task per chosen site, passes every update through the gate as it arrives, and, once all have answered, failed
or run into `round_timeout`, or the quorum's rule says so, aggregates, writes the next global model and then `round.json`, which
commits the round. With fewer than `min_clients` accepted updates it asks the missing sites again, `round_retries` times, and then
fails, with every missing site's cause in its message. Caches and persists nothing.
"""

import asyncio
import time
from collections.abc import Collection
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from fedpool.errors import RoundError
from fedpool.flows.expected import expected
from fedpool.flows.plan import Step, asks_everyone, unscored_best
from fedpool.manifest import Task
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.site_order import in_order
from fedpool.sites.local import Sites
from fedpool.storable import storable
from fedpool.store import Store, check_digest
from fedpool.tasks.absence import how_to_resume, unasked
from fedpool.tasks.aggregate import Before, UpdateChanged, aggregate
from fedpool.tasks.arithmetic import CURRENT, Arithmetic
from fedpool.tasks.causes import causes, uncounted
from fedpool.tasks.collect import Asked, Round, Turn, asked_before, collect
from fedpool.tasks.gate import Accepted, Expected, Late, Outcome, Rejected
from fedpool.tasks.key_metric import MetricRules
from fedpool.tasks.publish import copy_model, publish_submitted
from fedpool.tasks.quarantine import quarantined
from fedpool.tasks.quorum import Quorum
from fedpool.tasks.record import Record, known_weights, round_record
from fedpool.tasks.report import Reporter
from fedpool.tasks.retention import drop_updates, outdated
from fedpool.tasks.sampling import choose_sites
from fedpool.tasks.strategy import Strategy
from fedpool.tasks.used import Counted
from fedpool.tensors import Digest, TensorReader

LOOK_AHEAD = 2
"""Rounds that are begun ahead of the one that trains: beginning one takes Prefect longer than a short round does."""


class RoundSignals:
    """How a job's loop and the run of a round talk: `turn` tells the round what to do, `committed` tells the loop.

    `created`, that its run is there or could not be created, tells the next round, which the server would serve no sooner.
    """

    __slots__ = ("committed", "created", "turn")

    def __init__(self) -> None:
        self.created = asyncio.Event()
        self.turn: asyncio.Future[Step | None] = asyncio.get_running_loop().create_future()
        self.committed = asyncio.Event()


class Job:
    """A job that is under way: what its rounds share, and what they have committed so far."""

    # Not a dataclass and without __dict__: Prefect walks the parameters of flows, and this is nothing for it to walk.
    __slots__ = (
        "arithmetic",
        "counted",
        "head",
        "head_sha256",
        "holes",
        "initial",
        "job_id",
        "late",
        "look_ahead",
        "paths",
        "recipe",
        "records",
        "reporter",
        "resumed_at",
        "rounds",
        "rules",
        "sites",
        "state",
        "store",
        "strategy",
    )

    def __init__(
        self,
        recipe: Recipe,
        job_id: str,
        store: Store,
        sites: Sites,
        head: Digest,
        described_sha256: str,
        look_ahead: int = LOOK_AHEAD,
        arithmetic: Arithmetic = CURRENT,
        holes: frozenset[str] | None = None,
        rules: MetricRules | None = None,
    ) -> None:
        self.recipe = recipe
        self.job_id = job_id
        self.paths = JobPaths(job_id)
        self.store = store
        self.sites = sites
        self.look_ahead = look_ahead
        self.arithmetic = arithmetic
        self.holes = holes
        self.rules = rules or MetricRules.of(recipe)
        """Of metrics: as the job began, whoever goes on with it."""
        self.strategy: Strategy = recipe.strategy(len(sites.names))
        self.initial = head
        """The model of round 0."""
        self.head = head
        """The newest global model."""
        self.state: Digest | None = None
        """What the strategy carries into the next round, if anything."""
        self.head_sha256 = described_sha256
        """Hash of the newest `round.json`; before the first, of `job.json`."""
        self.records: list[Record] = []
        self.counted = Counted(recipe.aggregation_weights)
        self.late: set[tuple[int, str, int]] = set()
        """Rounds, sites and attempts of the updates that were late and have not come yet."""
        self.resumed_at = 0
        """The round in which an earlier coordinator left the job, if there was one: parts of it may be done."""
        self.rounds: dict[int, RoundSignals] = {}
        self.reporter = Reporter()

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name

    def before(self, number: int, base: TensorReader) -> Before:
        """What a training round starts from."""
        state = self.store.tensors(self.paths.state(number - 1), self.state.size) if self.state else None
        self.counted.follow(self.records)
        weights = dict(self.counted.first_weights)
        return Before(base, state, number, holes=self.holes or frozenset(), weights=weights)


@flow(name="federated-round", validate_parameters=False, persist_result=False)
async def federated_round(job: Job, number: int) -> State[Any] | None:
    """Wait for the round's turn, run it and commit it; appends its record to the job.

    Returns: a Cancelled state when the job ended before the round's turn.

    Raises:
        RoundError: fewer updates were accepted than its step needs.
    """
    recipe, store, paths = job.recipe, job.store, job.paths
    chosen, _ = _choose(job, number, asks_everyone(recipe, job.records, number))  # as far as is known before its turn
    asked: dict[str, Asked] = {}
    if number == job.resumed_at:
        found = await asyncio.to_thread(store.tree, paths.round(number))
        asked = asked_before(found, lives_on=job.sites.have_runs)
    round = Round(number, job.sites, store, retries=recipe.site_retries, patience_s=recipe.site_patience_s, asked=asked)
    not_asked: dict[str, str] = {}
    collecting = asyncio.create_task(collect(round, chosen))
    try:
        step = await job.rounds[number].turn
        if step is not None:
            started = time.monotonic()
            head = step.model or job.head
            await asyncio.to_thread(_have_model, job, number, step)
            base = await asyncio.to_thread(store.tensors, paths.global_model(number), head.size)
            wanted = expected(
                recipe, job.strategy, job.job_id, number, step.task, head, base, job.holes, job.arithmetic
            )
            ahead, (chosen, probes) = chosen, _choose(job, number, step.everyone, step.task)
            not_asked = await unasked(job.records, job.sites, chosen, probes=probes, needed=step.min_answers)
            asked_now = [site for site in chosen if site not in not_asked]
            round.begin(_turn(job, step, head, wanted, asked_now, probes))
            await collect(round, in_order(set(asked_now) - set(ahead)))
    finally:
        if not round.turn.done():
            round.begin(None)
        outcomes = await collecting
        if round.answers is not None:
            round.answers.end()
    if step is None:
        return Cancelled(message="the job ended before this round's turn")
    task, retries = step.task, recipe.round_retries
    while len(_accepted(outcomes)) < step.min_answers and retries and not job.sites.cancelled:
        retries -= 1
        not_asked = {site: reason for site, reason in not_asked.items() if site in probes}  # the others are asked now
        outcomes += await _ask_again(job, number, step, set(chosen) - probes, wanted, outcomes)
    trained = time.monotonic()
    following = None
    while task == "train" and following is None and len(_accepted(outcomes)) >= recipe.min_clients:
        try:
            following = await asyncio.to_thread(
                aggregate,
                job.strategy,
                store=store,
                before=await asyncio.to_thread(job.before, number, base),
                updates=_accepted(outcomes),
                factors=recipe.aggregation_weights,
                target=paths.global_model(number + 1),
                state_target=paths.state(number),
                arithmetic=job.arithmetic,
            )
        except UpdateChanged as changed:
            outcomes = [_unless_changed(outcome, changed) for outcome in outcomes]
    models: list[dict[str, Any]] | None = None
    if task == "submit_model":
        best = unscored_best(recipe, job.records, job.sites.names)
        models, lost = await asyncio.to_thread(_publish, job, number, base, best, _accepted(outcomes))
        for of_site in lost:
            outcomes = [_unless_changed(outcome, of_site) for outcome in outcomes]
        if without := [outcome.site for outcome in _accepted(outcomes) if outcome.tensors is None]:
            get_run_logger().warning("no model of their own, and so none to score: %s", ", ".join(without))
    accepted = _accepted(outcomes)
    ended = time.monotonic()
    record = round_record(
        job_id=job.job_id,
        round=number,
        task=task,
        outcomes=outcomes,
        not_asked=not_asked,
        known_weights=known_weights(job.records),
        owner=step.owner,
        origin=step.origin,
        base=head,
        following=following.model if following else None,
        state=following.state if following else None,
        models=models,
        previous_sha256=job.head_sha256,
        timings={"train_s": trained - started, "aggregate_s": ended - trained, "round_s": ended - started},
        arithmetic=job.arithmetic,
    )
    missing = causes(record)
    if len(accepted) < step.min_answers:
        raise RoundError(
            f"round {number}: {len(accepted)} of {len(chosen)} sites sent an update that was accepted, "
            f"min_clients is {recipe.min_clients}\n{missing}{how_to_resume(record)}"
        )
    if missing:
        get_run_logger().warning("round %d goes on without some sites\n%s", number, missing)
    if (why := uncounted(record, recipe.aggregation_weights)) is not None:
        get_run_logger().warning("round %d: %s", number, why)
    digest = await asyncio.to_thread(store.write_json, paths.record(number), record)
    job.records.append(record)
    job.head_sha256 = digest.sha256
    if following is not None:
        job.head, job.state = following.model, following.state
    job.reporter.table(record)
    job.rounds[number].committed.set()
    # The next round is under way by now: this costs it nothing.
    for outcome in accepted:
        await asyncio.to_thread(store.settle, paths.update(number, outcome.site, outcome.attempt))
    for old in outdated(job.records, recipe.keep_updates)[-1:]:  # those before it went in their time
        await asyncio.to_thread(drop_updates, store, job.job_id, old)
    job.late |= {(number, outcome.site, outcome.attempt) for outcome in outcomes if isinstance(outcome, Late)}
    await asyncio.to_thread(_name_late, job)
    return None


def _name_late(job: Job) -> None:
    """Say which updates have come after their rounds had closed."""
    for key in sorted(job.late):
        round, site, attempt = key
        if job.store.exists(job.paths.manifest(round, site, attempt)):
            job.late.discard(key)
            get_run_logger().warning(
                "%s's update of round %d came when that round had closed: it stays in the store, and is not used",
                site,
                round,
            )


def _have_model(job: Job, number: int, step: Step) -> None:
    """See to it that the round's global model is there: for a submission, it is still that of the round before.

    Raises:
        IntegrityError: it is not what was committed.
    """
    if step.task != "submit_model":
        return  # the round that it came of has written it
    path = job.paths.global_model(number)
    if job.store.exists(path):  # an earlier coordinator has written it, and sites may be reading it
        with job.store.open(path) as file:
            check_digest(file, job.head, where=job.store.full(path))
    else:
        copy_model(job.store, job.paths.global_model(step.origin), job.head, path)


def _publish(
    job: Job, number: int, base: TensorReader, best: dict[str, Any] | None, submitted: Collection[Accepted]
) -> tuple[list[dict[str, Any]], list[UpdateChanged]]:
    """Write the models that are to be scored as those of the rounds to come; see `publish_submitted`."""
    models = [] if best is None else [best]
    if best is not None:
        digest = Digest(best["sha256"], best["size"])
        copy_model(job.store, job.paths.global_model(best["round"]), digest, job.paths.global_model(number + 1))
    of_sites, lost = publish_submitted(
        job.store, job.paths, base, tuple(submitted), number + 1 + len(models), job.arithmetic
    )
    return models + of_sites, lost


def _choose(job: Job, number: int, everyone: bool, task: Task = "train") -> tuple[tuple[str, ...], frozenset[str]]:
    """The sites of a round, and those of them that are in quarantine, by the rounds that are committed."""
    recipe = job.recipe
    probes = quarantined(job.records, recipe.max_rejections)
    choose = job.strategy.choose if task == "train" and not everyone else choose_sites
    size = None if everyone else recipe.sample_size
    there = job.arithmetic.ordered(set(job.sites.names) - probes)
    chosen = choose(seed=recipe.seed, round=number, sites=there, count=size)
    return tuple(in_order((*chosen, *probes))), probes


def _turn(
    job: Job,
    step: Step,
    head: Digest,
    wanted: Expected,
    sites: Collection[str],
    probes: Collection[str],
    there: int = 0,
) -> Turn:
    """What the sites of a round are asked, from now on.

    Args:
        probes: those of the sites that are in quarantine.
        there: updates that the round has already.
    """
    recipe = job.recipe
    deadline = time.monotonic() + recipe.round_timeout if recipe.round_timeout is not None else None
    if step.everyone:
        quorum = Quorum(len(sites))
    else:
        take = recipe.clients_per_round - there if recipe.clients_per_round and recipe.over_sample else None
        quorum = Quorum(max(1, recipe.min_clients - there), recipe.quorum_grace, take)
    shared = job.strategy.shared and step.task == "train"
    state = job.state if shared else None
    job.counted.follow(job.records)
    used = job.counted.used(sites) if shared else {}
    return Turn(
        step.task, head, wanted, state=state, deadline=deadline, quorum=quorum, sites=sites, probes=probes, used=used
    )


def _unless_changed(outcome: Outcome, changed: UpdateChanged) -> Outcome:
    """The outcome, or that of an update which was changed after the gate had let it pass."""
    if not isinstance(outcome, Accepted) or outcome.site != changed.site:
        return outcome
    get_run_logger().warning("%s: update rejected (changed): %s", changed.site, changed)
    return Rejected(
        outcome.site, outcome.attempt, outcome.manifest, outcome.manifest_sha256, "changed", storable(str(changed))
    )


def _accepted(outcomes: Collection[Outcome]) -> list[Accepted]:
    return [outcome for outcome in outcomes if isinstance(outcome, Accepted)]


async def _ask_again(
    job: Job,
    number: int,
    step: Step,
    counted: Collection[str],
    wanted: Expected,
    before: Collection[Outcome],
) -> list[Outcome]:
    """Ask the sites once more whose updates the round still lacks; updates that were accepted stay.

    Args:
        counted: the round's sites, without those in quarantine.
    """
    recipe = job.recipe
    there = {outcome.site for outcome in _accepted(before)}
    attempts = {outcome.site: outcome.attempt for outcome in before}  # the last of a site wins
    missing = in_order(set(counted) - there)
    get_run_logger().warning("round %d is tried again with %s: too few updates", number, ", ".join(missing[:8]))
    asked = {site: Asked(attempts[site] + 1, False) for site in missing if site in attempts}
    round = Round(
        number, job.sites, job.store, retries=recipe.site_retries, patience_s=recipe.site_patience_s, asked=asked
    )
    round.begin(_turn(job, step, step.model or job.head, wanted, missing, (), len(there)))
    try:
        return await collect(round, missing)
    finally:
        if round.answers is not None:
            round.answers.end()
