"""`federated_job`: one execution of a recipe, one flow run.

Writes the bundle, the initial model and `job.json`, runs the rounds that `fedpool.flows.plan`
determines, and writes `result.json`, which marks the job's end and says how it ended. Needs sites
that no other job uses, and always ends their scripts. Persists no Prefect result: all results are
in the store.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed

from fedpool.errors import FedpoolError, IntegrityError, JobFailed, RecipeError, RoundError, StoreError
from fedpool.flows.late_arrivals import name_dropped
from fedpool.flows.plan import best_model, next_step, num_expected
from fedpool.flows.round_run import run_round
from fedpool.flows.staging import stage
from fedpool.flows.take_up import take_up
from fedpool.flows.under_way import Job, RoundSignals
from fedpool.recipe import Recipe
from fedpool.sites.sites import Sites
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks.causes import evaluation_error
from fedpool.tasks.findings import findings
from fedpool.tasks.job_record import (
    JOB_FORMAT,
    EnvironmentRecord,
    JobOutcome,
    JobResult,
    Parent,
    ScoredModel,
)
from fedpool.tasks.key_metric import metric_gap
from fedpool.tasks.matrix import cross_site_matrix
from fedpool.tasks.observer import Beginning, Ending, Observer
from fedpool.tasks.record import RoundRecord, num_trained
from fedpool.tensors import Digest

_MAX_ERROR = 1 << 18
"""Maximum length of a job's error message, which names every site."""


@flow(name="federated-job", flow_run_name="{recipe.name}", validate_parameters=False, persist_result=False)
async def federated_job(
    recipe: Recipe,
    job_id: str,
    store: str,
    sites: Sites,
    resume: bool = False,
    parent: Parent | None = None,
    environment: EnvironmentRecord | None = None,
    observers: Sequence[Observer] = (),
) -> State[Any]:
    """Run a recipe to its end, from the process that holds it.

    Args:
        recipe: what to run.
        job_id: the job's folder in the store.
        store: fsspec URL of the store.
        sites: how to reach the sites.
        resume: continue a job that was begun before.
        parent: the job and round that a new job is a fork of.
        environment: where and how a new job runs.
        observers: those who follow the job.

    Returns: a Completed or a Cancelled state; the result is in the store.

    Raises:
        JobFailed: a round failed; `result.json` still names the last committed model.
        RecipeError: the job to resume has another recipe or other sites.
        StoreError: another process runs the job.
    """
    storage = Store(store)
    with storage.held(job_id):
        try:
            if not resume:
                stage_job = partial(stage, simulated=sites.traits.simulated, parent=parent, environment=environment)
                await asyncio.to_thread(stage_job, recipe, job_id, storage, sites.names)
            job = await asyncio.to_thread(
                partial(take_up, observers=observers, fresh=not resume), recipe, job_id, storage, sites
            )
        except BaseException:
            await sites.end()
            raise
        return await run_job(job)


async def run_job(job: Job) -> State[Any]:
    """Run a staged job to its end, in its flow run; see `federated_job`. Always ends the sites."""
    recipe, storage, sites = job.recipe, job.store, job.sites
    for note in recipe.bundle.notes:
        get_run_logger().info("%s", note)
    stopped_by = error = None
    job.observer.begun(
        Beginning(job.job_id, recipe.name, storage, sites.names, job.ledger.job.fields, recipe.key_metric)
    )
    if job.observer.wants_scalars and not sites.traits.simulated:
        await asyncio.to_thread(_ask_for_scalars, job)
    try:
        await asyncio.to_thread(sites.open, recipe.client_job(job.job_id, job.ledger.job.model), storage)
        try:
            stopped_by = await _run_rounds(job)
        except Exception as failure:  # noqa: BLE001  # the store has to record every kind of ending
            error = "cancelled" if sites.cancelled else _failure(failure, job)
        except asyncio.CancelledError:
            # The run is being cancelled, or this process ended, without waiting: the sites learn it
            # from the result.
            sites.cancel()
            result = _result(job, "CANCELLED", None, "cancelled")
            storage.write_json(job.paths.result, result.as_json())
            job.observer.interrupted(Ending(recipe.name, result, job.records, storage))
            raise
    finally:
        if job.clock is not None:
            await job.clock.close()
        await sites.end()
    status: JobOutcome = "CANCELLED" if sites.cancelled else "FAILED" if error else "COMPLETED"
    for site, how in sites.endings.items():
        get_run_logger().warning("%s: after its last round, %s", site, how)
    matrix = None
    if status == "COMPLETED" and recipe.cross_site_eval:
        matrix = cross_site_matrix(job.records, best_model(recipe, job.records))
        cross_site = await asyncio.to_thread(storage.write_json, job.paths.cross_site, matrix)
    result = _result(job, status, stopped_by, error, cross_site if matrix is not None else None)
    try:
        await asyncio.to_thread(storage.write_json, job.paths.result, result.as_json())
    except StoreError as unwritten:  # the cause of the failure may prevent this write too
        job.observer.interrupted(Ending(recipe.name, result, job.records, storage))
        raise JobFailed(f"job {job.job_id} failed: {error or _failure(unwritten, job)}") from unwritten
    await asyncio.to_thread(name_dropped, job)
    told = findings(job.rules, recipe.aggregation_weights, job.records)
    job.observer.ended(Ending(recipe.name, result, job.records, storage, matrix, told))
    await job.observer.finish()
    if status == "CANCELLED":
        return Cancelled(message=f"cancelled after {len(job.records)} rounds")
    if error:
        raise JobFailed(f"job {job.job_id} failed: {error}")
    return Completed(message=f"{recipe.name}: {len(job.records)} rounds")


def _ask_for_scalars(job: Job) -> None:
    """Have remote sites send all scalars that their scripts log. Never fails the job."""
    try:
        if not job.store.exists(job.paths.tracked):
            job.store.write_json(job.paths.tracked, {})
    except StoreError as error:
        get_run_logger().warning("trackers won't get the values that scripts log: %s", error)


def _failure(failure: Exception, job: Job) -> str:
    """The job's error message; if the store caused the failure, it says how to resume the job."""
    if isinstance(failure, RoundError) and failure.__cause__ is not None:  # from the user's code
        get_run_logger().error("a round ended with an error in the algorithm's code", exc_info=failure.__cause__)
    if not isinstance(failure, FedpoolError):  # unexpected, so log its traceback
        get_run_logger().error("a round ended with an unexpected error", exc_info=failure)
        return storable(f"{type(failure).__name__}: {failure}", _MAX_ERROR)
    if not isinstance(failure, StoreError) or isinstance(failure, IntegrityError):
        return storable(str(failure), _MAX_ERROR)
    return f"{failure}; then resume the job: fedpool job resume {job.job_id} --store {job.store.url}"


async def _run_rounds(job: Job) -> str | None:
    """Run the remaining rounds; returns the rule that stopped the training early, if any."""
    recipe, num_sites = job.recipe, len(job.sites.names)
    step, stopped_by = next_step(recipe, job.records)
    has_gap = _check_metrics(job, job.records)
    runs: dict[int, asyncio.Task[None]] = {}
    try:
        while step is not None:
            number = len(job.records)
            end = min(number + 1 + job.look_ahead, num_expected(recipe, job.records, num_sites))
            for ahead in range(number, end):
                if ahead not in runs:
                    runs[ahead] = _begin(job, ahead)
            job.rounds[number].step.set_result(step)
            await _committed(job, number, runs[number])
            has_gap = has_gap or _check_metrics(job, job.records[-1:])
            step, stopped_by = next_step(recipe, job.records)
            job.observer.progressed(100 * len(job.records) / max(1, num_expected(recipe, job.records, num_sites)))
    finally:
        for signals in job.rounds.values():
            if not signals.step.done():
                signals.step.set_result(None)
        # The run of a committed round may still be reporting its end to Prefect.
        await asyncio.gather(*runs.values(), return_exceptions=True)
    job.observer.progressed(100)
    if failed := evaluation_error(job.records):
        get_run_logger().warning("%s", failed)
    elif len(job.records) == num_trained(job.records):
        why = "no site reported metrics" if recipe.final_evaluation else "final_evaluation is False"
        get_run_logger().info(
            "%s, so the final model is not scored; the best one is the start of round %d",
            why,
            best_model(recipe, job.records),
        )
    return stopped_by


def _check_metrics(job: Job, records: Sequence[RoundRecord]) -> bool:
    """Whether rounds lack the metrics that the recipe uses. If so, the log says it.

    Raises:
        RecipeError: the user asked for something that depends on them.
    """
    gap = metric_gap(job.rules, records)
    if gap is None:
        return False
    if gap.is_fatal:
        raise RecipeError(gap.text)
    get_run_logger().warning("%s", gap.text)
    return True


def _begin(job: Job, number: int) -> asyncio.Task[None]:
    """Create the flow run of a round; it waits for its turn."""
    job.rounds[number] = RoundSignals()
    return asyncio.create_task(run_round(job, number))


async def _committed(job: Job, number: int, run: asyncio.Task[None]) -> None:
    """Wait until the round is committed; raises its run's exception."""
    commit = asyncio.create_task(job.rounds[number].committed.wait())
    try:
        await asyncio.wait({commit, run}, return_when=asyncio.FIRST_COMPLETED)
        if not job.rounds[number].committed.is_set():
            await run
    finally:
        commit.cancel()


def _result(
    job: Job, status: JobOutcome, stopped_by: str | None, error: str | None, cross_site: Digest | None = None
) -> JobResult:
    """The contents of `result.json`: how the job ended, its final and best models, with scores."""
    recipe = job.recipe
    final = num_trained(job.records)

    def scored(round: int) -> ScoredModel:
        record = job.records[round] if round < len(job.records) else None
        return ScoredModel(
            round=round,
            path=job.store.full(job.paths.global_model(round)),
            metrics=record.metrics if record else {},
            denominators=record.denominators if record else {},
        )

    return JobResult(
        format=JOB_FORMAT,
        job_id=job.job_id,
        status=status,
        error=error,
        stopped_by=stopped_by,
        evaluation_error=evaluation_error(job.records),
        endings=dict(job.sites.endings),
        num_rounds=final,
        num_records=len(job.records),
        key_metric=recipe.key_metric,
        key_metric_mode=recipe.key_metric_mode,
        final=scored(final),
        best=scored(best_model(recipe, job.records)),
        cross_site=cross_site,
        last_record_sha256=job.ledger.sha256,
    ).sealed()
