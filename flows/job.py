"""`federated_job`: one execution of a recipe, one flow run.

Writes the bundle, the initial model and `job.json`, runs the rounds, scores the last model in one evaluation round, and writes
`result.json`, which says that the job ended and how. Requires sites that nobody else uses; ends their scripts in every case.
Persists no Prefect result: whatever lasts is in the store.
"""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed

from fedpool.errors import FedpoolError, IntegrityError, JobFailed
from fedpool.flows.round import LOOK_AHEAD, Job, RoundSignals, federated_round
from fedpool.flows.staging import JOB_FORMAT, Parent, check_unchanged, sha256_without, stage
from fedpool.manifest import Task
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.sites.local import Sites
from fedpool.store import Store, check_digest
from fedpool.tasks.metrics import best_round, has_stalled
from fedpool.tasks.record import Record
from fedpool.tensors import Digest


@flow(name="federated-job", flow_run_name="{recipe.name}", validate_parameters=False, persist_result=False)
async def federated_job(
    recipe: Recipe, job_id: str, store: str, sites: Sites, resume: bool = False, parent: Parent | None = None
) -> State[Any]:
    """Run a recipe to its end, from the process that holds it.

    Args:
        recipe: what to run.
        job_id: the job's folder in the store.
        store: fsspec URL of the store.
        sites: how to reach the sites.
        resume: go on with a job that was begun before.
        parent: what a new job is a fork of.

    Returns: a Completed or a Cancelled state; the result is in the store.

    Raises:
        JobFailed: a round failed; `result.json` names the last committed model all the same.
        RecipeError: the job that is to go on has another recipe or other sites.
        StoreError: another process runs the job.
    """
    storage = Store(store)
    with storage.held(job_id):
        try:
            if not resume:
                stage_job = partial(stage, simulated=not sites.have_runs, parent=parent)
                await asyncio.to_thread(stage_job, recipe, job_id, storage, sites.names)
            job = await asyncio.to_thread(partial(take_up, fresh=not resume), recipe, job_id, storage, sites)
        except BaseException:
            await sites.end()
            raise
        return await run_job(job)


def take_up(
    recipe: Recipe, job_id: str, store: Store, sites: Sites, look_ahead: int = LOOK_AHEAD, *, fresh: bool = False
) -> Job:
    """A job that was staged, or begun and lost, as far as it has come: from its last commit on it is run like any other.

    What is committed is checked against the records' chain of hashes. A global model or a state that no record names yet is
    nobody's word, and goes; so does the result of a job that has failed or was cancelled.

    Args:
        fresh: this very process has just staged it.

    Raises:
        FileNotFoundError: there is no such job.
        IntegrityError: what is committed is not what it says.
        RecipeError: the job has another recipe or other sites.
    """
    paths = JobPaths(job_id)
    described = store.read_bytes(paths.job)
    check_unchanged(recipe, job_id, store, sites.names)
    head = Digest(**json.loads(described)["model"])
    job = Job(recipe, job_id, store, sites, head, hashlib.sha256(described).hexdigest(), look_ahead)
    while store.exists(path := paths.record(len(job.records))):
        data = store.read_bytes(path)
        record = json.loads(data)
        if record["previous_sha256"] != job.head_sha256 or Digest(**record["global"]) != job.head:
            raise IntegrityError(f"{store.full(path)} does not follow from the round before it: verify the job")
        job.records.append(record)
        job.head_sha256 = hashlib.sha256(data).hexdigest()
        if record["next_global"]:
            job.head = Digest(**record["next_global"])
            job.state = Digest(**record["state"]) if record["state"] else None
    job.resumed_at = len(job.records)
    trained = sum(record["task"] == "train" for record in job.records)
    if not fresh:
        with store.open(paths.global_model(trained)) as file:
            check_digest(file, job.head, where=store.full(paths.global_model(trained)))
        if job.state is not None:
            with store.open(paths.state(trained - 1)) as file:
                check_digest(file, job.state, where=store.full(paths.state(trained - 1)))
    store.remove(paths.global_model(trained + 1))
    store.remove(paths.state(trained))
    store.remove(paths.result)
    return job


async def run_job(job: Job) -> State[Any]:
    """Run a staged job to its end, inside its flow run; see `federated_job`. Ends the sites in every case."""
    recipe, storage, sites = job.recipe, job.store, job.sites
    stopped_by = error = None
    try:
        await asyncio.to_thread(sites.open, recipe.client_job(job.job_id), storage)
        try:
            stopped_by = await _run_rounds(job)
        except FedpoolError as failure:
            error = "cancelled" if sites.cancelled else str(failure)
        except asyncio.CancelledError:
            # Someone cancels the run, or ends this process, and waits for nothing: the sites learn of it from the result.
            sites.cancel()
            storage.write_json(job.paths.result, _result(job, "CANCELLED", None, "cancelled"))
            raise
    finally:
        await sites.end()
    status = "CANCELLED" if sites.cancelled else "FAILED" if error else "COMPLETED"
    result = _result(job, status, stopped_by, error)
    await asyncio.to_thread(storage.write_json, job.paths.result, result)
    job.reporter.report(recipe.name, result, job.records, storage)
    await job.reporter.finish()
    if status == "CANCELLED":
        return Cancelled(message=f"cancelled after {len(job.records)} rounds")
    if error:
        raise JobFailed(f"job {job.job_id} failed: {error}")
    return Completed(message=f"{recipe.name}: {len(job.records)} rounds")


async def _run_rounds(job: Job) -> str | None:
    """Run the training rounds and the evaluation of the last model; returns what stopped the job early, if anything did."""
    task, stopped_by = _next(job)
    runs: dict[int, asyncio.Task[None]] = {}
    try:
        while task is not None:
            number = len(job.records)
            for ahead in range(number, number + 1 + job.look_ahead):
                if ahead not in runs and (ahead == number or (task == "train" and _is_expected(job, ahead))):
                    runs[ahead] = _begin(job, ahead)
            job.rounds[number].turn.set_result(task)
            await _committed(job, number, runs[number])
            job.reporter.progress(100 * (number + 1) / (job.recipe.num_rounds + 1))
            task, stopped_by = _next(job)
    finally:
        for signals in job.rounds.values():
            if not signals.turn.done():
                signals.turn.set_result(None)
        # The run of a committed round may still be reporting its end to Prefect.
        await asyncio.gather(*runs.values(), return_exceptions=True)
    job.reporter.progress(100)
    return stopped_by


def _begin(job: Job, number: int) -> asyncio.Task[None]:
    """Create the flow run of a round; it waits for its turn."""
    job.rounds[number] = RoundSignals()

    async def run() -> None:
        with suppress(CancelledRun):  # its turn never came
            await federated_round(job, number)

    return asyncio.create_task(run())


async def _committed(job: Job, number: int, run: asyncio.Task[None]) -> None:
    """Wait until the round is committed; raises what its run raises."""
    commit = asyncio.create_task(job.rounds[number].committed.wait())
    try:
        await asyncio.wait({commit, run}, return_when=asyncio.FIRST_COMPLETED)
        if not job.rounds[number].committed.is_set():
            await run
    finally:
        commit.cancel()


def _is_expected(job: Job, number: int) -> bool:
    """Whether a round will come, as far as is known: the evaluation does when there are metrics."""
    num_rounds = job.recipe.num_rounds
    return number < num_rounds or (number == num_rounds and any(record["metrics"] for record in job.records))


def _next(job: Job) -> tuple[Task | None, str | None]:
    """What the next round does, and what stopped the training early, if anything did: a function of the committed rounds."""
    recipe = job.recipe
    training = [record for record in job.records if record["task"] == "train"]
    stopped_by = None
    if len(training) < recipe.num_rounds:
        stopped_by = _stops(recipe, training) if training else None
        if stopped_by is None:
            return "train", None
    if len(training) < len(job.records):
        return None, stopped_by
    if any(record["metrics"] for record in training):
        return "evaluate", stopped_by  # sites score the model that they receive: the last one needs a round of its own
    get_run_logger().info("no site reported metrics: the last model is not scored, and counts as the best")
    return None, stopped_by


def _stops(recipe: Recipe, training: Sequence[Record]) -> str | None:
    metrics = training[-1]["metrics"]
    if (condition := recipe.stop_condition) and condition.holds(metrics):
        return f"{condition} (it was {metrics[condition.metric]:.6g} at the start of round {training[-1]['round']})"
    scores = [record["metrics"].get(recipe.key_metric) for record in training]
    if recipe.patience and has_stalled(scores, recipe.key_metric_mode, recipe.patience):
        return f"{recipe.key_metric} did not improve in {recipe.patience} rounds"
    return None


def _result(job: Job, status: str, stopped_by: str | None, error: str | None) -> dict[str, Any]:
    """What `result.json` holds: how the job ended, its final and its best model with their scores."""
    recipe = job.recipe
    training = [record for record in job.records if record["task"] == "train"]
    final = len(training)
    best = best_round([record["metrics"].get(recipe.key_metric) for record in job.records], recipe.key_metric_mode)

    def describe(round: int) -> dict[str, Any]:
        metrics = job.records[round]["metrics"] if round < len(job.records) else {}
        return {"round": round, "path": job.store.full(job.paths.global_model(round)), "metrics": metrics}

    result = {
        "format": JOB_FORMAT,
        "job_id": job.job_id,
        "status": status,
        "error": error,
        "stopped_by": stopped_by,
        "num_rounds": final,
        "num_records": len(job.records),
        "key_metric": recipe.key_metric,
        "final": describe(final),
        "best": describe(final if best is None else best),
        "last_record_sha256": job.head_sha256,
    }
    return result | {"sha256": sha256_without(result)}
