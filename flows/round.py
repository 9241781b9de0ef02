"""`federated_round`: one global step, one flow run, named "<job name> round 3".

Its run is created while an earlier round still trains, because that costs Prefect some 0.2 s, and waits for its turn.
Fans out one task per chosen site, passes every update through the gate as it arrives, and, once all have answered, failed
or run into `round_timeout`, aggregates, writes the next global model and then `round.json`, which commits the round. Fails when
fewer than `min_clients` updates were accepted, with every missing site's cause in its message. Caches and persists nothing.
"""

import asyncio
import re
import time
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from fedpool.errors import RoundError
from fedpool.manifest import Task
from fedpool.recipe import Recipe
from fedpool.sites.local import Sites
from fedpool.store import JobPaths, Store
from fedpool.tasks.aggregate import aggregate
from fedpool.tasks.collect import Round, Turn, collect
from fedpool.tasks.gate import Accepted, Expected
from fedpool.tasks.record import Record, causes, known_weights, round_record
from fedpool.tasks.report import Reporter
from fedpool.tasks.sampling import choose_sites
from fedpool.tensors import Digest, TensorReader

LOOK_AHEAD = 2
"""Rounds that are begun ahead of the one that trains: beginning one takes Prefect longer than a short round does."""


class RoundSignals:
    """How a job's loop and the run of a round talk: `turn` tells the round what to do, `committed` tells the loop."""

    __slots__ = ("committed", "turn")

    def __init__(self) -> None:
        self.turn: asyncio.Future[Task | None] = asyncio.get_running_loop().create_future()
        self.committed = asyncio.Event()


class Job:
    """A job that is under way: what its rounds share, and what they have committed so far."""

    # Not a dataclass and without __dict__: Prefect walks the parameters of flows, and this is nothing for it to walk.
    __slots__ = (
        "head",
        "head_sha256",
        "job_id",
        "look_ahead",
        "paths",
        "recipe",
        "records",
        "reporter",
        "rounds",
        "sites",
        "store",
    )

    def __init__(
        self, recipe: Recipe, job_id: str, store: Store, sites: Sites, head: Digest, look_ahead: int = LOOK_AHEAD
    ) -> None:
        self.recipe = recipe
        self.job_id = job_id
        self.paths = JobPaths(job_id)
        self.store = store
        self.sites = sites
        self.look_ahead = look_ahead
        self.head = head
        """The newest global model."""
        self.head_sha256: str | None = None
        """Hash of the newest `round.json`."""
        self.records: list[Record] = []
        self.rounds: dict[int, RoundSignals] = {}
        self.reporter = Reporter()

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name


@flow(
    name="federated-round",
    flow_run_name="{job.name} round {number}",
    validate_parameters=False,
    persist_result=False,
)
async def federated_round(job: Job, number: int) -> State[Any] | None:
    """Wait for the round's turn, run it and commit it; appends its record to the job.

    Returns: a Cancelled state when the job ended before the round's turn.

    Raises:
        RoundError: fewer than `min_clients` updates were accepted (an evaluation needs none).
    """
    recipe, store, paths = job.recipe, job.store, job.paths
    chosen = choose_sites(recipe.seed, number, job.sites.names, recipe.clients_per_round)
    round = Round(number, job.sites, store)
    collecting = asyncio.create_task(collect(round, chosen))
    try:
        task = await job.rounds[number].turn
        if task is not None:
            started = time.monotonic()
            base = await asyncio.to_thread(store.tensors, paths.global_model(number), job.head.size)
            deadline = started + recipe.round_timeout if recipe.round_timeout is not None else None
            wanted = expected(recipe, job.job_id, number, task, job.head, base)
            round.turn.set_result(Turn(task, job.head, wanted, deadline))
    finally:
        if not round.turn.done():
            round.turn.set_result(None)
        outcomes = await collecting
    if task is None:
        return Cancelled(message="the job ended before this round's turn")
    trained = time.monotonic()
    accepted = [outcome for outcome in outcomes.values() if isinstance(outcome, Accepted)]
    enough = len(accepted) >= recipe.min_clients
    following = None
    if task == "train" and enough:
        following = await asyncio.to_thread(
            aggregate,
            recipe.strategy(),
            store=store,
            base=base,
            updates=accepted,
            factors=recipe.aggregation_weights,
            target=paths.global_model(number + 1),
        )
    ended = time.monotonic()
    record = round_record(
        job_id=job.job_id,
        round=number,
        task=task,
        outcomes=outcomes,
        known_weights=known_weights(job.records),
        base=job.head,
        following=following,
        previous_sha256=job.head_sha256,
        timings={"train_s": trained - started, "aggregate_s": ended - trained, "round_s": ended - started},
    )
    missing = causes(record)
    if task == "train" and not enough:
        raise RoundError(
            f"round {number}: {len(accepted)} of {len(chosen)} sites sent an update that was accepted, "
            f"min_clients is {recipe.min_clients}\n{missing}"
        )
    if missing:
        get_run_logger().warning("round %d goes on without some sites\n%s", number, missing)
    digest = await asyncio.to_thread(store.write_json, paths.record(number), record)
    job.records.append(record)
    job.head_sha256 = digest.sha256
    job.head = following or job.head
    job.reporter.table(record)
    job.rounds[number].committed.set()
    # The next round is under way by now: this costs it nothing.
    for outcome in accepted:
        await asyncio.to_thread(store.settle, paths.update(number, outcome.manifest.site))
    return None


def expected(recipe: Recipe, job_id: str, number: int, task: Task, head: Digest, base: TensorReader) -> Expected:
    """What the updates of a round have to fit.

    Args:
        head: digest of the round's global model.
        base: that model.
    """
    excluded = {name for name in base.spec for pattern in recipe.exclude_vars if re.search(pattern, name)}
    return Expected(
        job_id=job_id,
        round=number,
        task=task,
        base_sha256=head.sha256,
        spec={name: entry for name, entry in base.spec.items() if name not in excluded},
        transfer=recipe.params_transfer_type,
    )
