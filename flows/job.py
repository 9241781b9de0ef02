"""`federated_job`: one execution of a recipe, one flow run.

Writes the bundle, the initial model and `job.json`, runs the rounds, scores the last model in one evaluation round, and writes
`result.json`, which says that the job ended and how. Requires sites that nobody else uses; ends their scripts in every case.
Persists no Prefect result: whatever lasts is in the store.
"""

import asyncio
import hashlib
import platform
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed

from fedpool.bundle import Bundle
from fedpool.errors import FedpoolError, IntegrityError, JobFailed, RecipeError
from fedpool.flows.round import Job, RoundSignals, federated_round
from fedpool.initial import initial_model
from fedpool.manifest import ClientJob, Task
from fedpool.recipe import Recipe
from fedpool.sites.local import Sites
from fedpool.store import JobPaths, Store
from fedpool.tasks.metrics import best_round, has_stalled
from fedpool.tensors import Digest

JOB_FORMAT = 1


@flow(name="federated-job", flow_run_name="{recipe.name}", validate_parameters=False, persist_result=False)
async def federated_job(recipe: Recipe, job_id: str, store: str, sites: Sites) -> State[Any]:
    """Run a recipe to its end, from the process that holds it.

    Args:
        recipe: what to run.
        job_id: a new one; the job's folder in the store.
        store: fsspec URL of the store.
        sites: how to reach the sites.

    Returns: a Completed or a Cancelled state; the result is in the store.

    Raises:
        JobFailed: a round failed; `result.json` names the last committed model all the same.
    """
    storage = Store(store)
    try:
        head = await asyncio.to_thread(stage, recipe, job_id, storage, sites.names)
    except BaseException:
        await sites.end()
        raise
    return await run_job(Job(recipe, job_id, storage, sites, head))


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


def stage(recipe: Recipe, job_id: str, store: Store, sites: tuple[str, ...], *, template: bool = False) -> Digest:
    """Write a new job's bundle, initial model and, as their commit, `job.json`; returns the initial model's digest.

    Args:
        template: it never runs itself: a deployment makes its jobs from it.
    """
    paths = JobPaths(job_id)
    store.write_bytes(paths.bundle(recipe.bundle.sha256), recipe.bundle.data)
    digest: Digest = recipe.model.digest
    with store.staged(paths.global_model(0)) as file:
        recipe.model.write_to(file)
    store.write_json(
        paths.job,
        {
            "format": JOB_FORMAT,
            "job_id": job_id,
            "parent": None,
            "template": template,
            "recipe": {"type": type(recipe).__name__, **recipe.model_dump(mode="json")},
            "client": recipe.client_job(job_id).model_dump(mode="json"),
            "seed": recipe.seed,
            "sites": list(sites),
            "bundle_sha256": recipe.bundle.sha256,
            "model": {"sha256": digest.sha256, "size": digest.size},
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("fedpool", "prefect", "torch", "numpy", "safetensors")},
            },
        },
    )
    return digest


def restore(kind: type[Recipe], job_id: str, store: Store) -> Recipe:
    """The recipe of a staged job, as the store holds it.

    Args:
        kind: class of the recipe.

    Raises:
        FileNotFoundError: there is no such job.
        IntegrityError: what lies there is not what its `job.json` says.
        RecipeError: the job has another kind of recipe.
    """
    paths = JobPaths(job_id)
    record = store.read_json(paths.job)
    try:
        fields = dict(record["recipe"])
        found = fields.pop("type")
        client = ClientJob.model_validate(record["client"], strict=False)
        digest = Digest(**record["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{store.full(paths.job)} does not describe a job: {error}") from None
    if found != kind.__name__:
        raise RecipeError(f"job {job_id} has a {found}, not a {kind.__name__}")
    data = store.read_bytes(paths.bundle(client.bundle_sha256))
    if hashlib.sha256(data).hexdigest() != client.bundle_sha256:
        raise IntegrityError(f"{store.full(paths.bundle(client.bundle_sha256))} is not what its name says")
    with tempfile.TemporaryDirectory(prefix="fedpool-") as folder:
        model = initial_model(store.fetch(paths.global_model(0), Path(folder), digest))
    bundle = Bundle(client.entry, client.bundle_sha256, client.imports, data)
    return kind.restore({**fields, "model": model, "initial_ckpt": None}, bundle)


async def _run_rounds(job: Job) -> str | None:
    """Run the training rounds and the evaluation of the last model; returns what stopped the job early, if anything did."""
    task: Task | None = "train"
    stopped_by = None
    runs: list[asyncio.Task[None]] = []
    try:
        while task is not None:
            number = len(job.records)
            if number == len(runs):
                runs.append(_begin(job, number))
            job.rounds[number].turn.set_result(task)
            while task == "train" and len(runs) <= number + job.look_ahead and _is_expected(job, len(runs)):
                runs.append(_begin(job, len(runs)))
            await _committed(job, number, runs[number])
            job.reporter.progress(100 * (number + 1) / (job.recipe.num_rounds + 1))
            task, stopped_by = _next(job, task, stopped_by)
    finally:
        for signals in job.rounds.values():
            if not signals.turn.done():
                signals.turn.set_result(None)
        # The run of a committed round may still be reporting its end to Prefect.
        await asyncio.gather(*runs, return_exceptions=True)
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


def _next(job: Job, task: Task, stopped_by: str | None) -> tuple[Task | None, str | None]:
    """What the next round does, and what stopped the training early, if anything did."""
    if task == "evaluate":
        return None, stopped_by
    if len(job.records) < job.recipe.num_rounds:
        stopped_by = _stops(job)
        if stopped_by is None:
            return "train", None
    if any(record["metrics"] for record in job.records):
        return "evaluate", stopped_by  # sites score the model that they receive: the last one needs a round of its own
    get_run_logger().info("no site reported metrics: the last model is not scored, and counts as the best")
    return None, stopped_by


def _stops(job: Job) -> str | None:
    recipe = job.recipe
    metrics = job.records[-1]["metrics"]
    if (condition := recipe.stop_condition) and condition.holds(metrics):
        return f"{condition} (it was {metrics[condition.metric]:.6g} at the start of round {job.records[-1]['round']})"
    scores = [record["metrics"].get(recipe.key_metric) for record in job.records]
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

    return {
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
