"""Prepares a job to run from its last commit, whether it is new or resumed."""

import hashlib
from collections.abc import Sequence

from fedpool.errors import IntegrityError
from fedpool.flows.late_updates import folds
from fedpool.flows.plan import Step, next_step
from fedpool.flows.staging import check_unchanged
from fedpool.flows.under_way import LOOK_AHEAD, Job
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.sites.sites import Sites
from fedpool.store import Store
from fedpool.tasks.committed import Committed
from fedpool.tasks.job_record import JobRecord
from fedpool.tasks.ledger import Ledger
from fedpool.tasks.observer import Observer
from fedpool.tasks.record import RoundRecord
from fedpool.tasks.staleness import awaited


def take_up(
    recipe: Recipe,
    job_id: str,
    store: Store,
    sites: Sites,
    look_ahead: int = LOOK_AHEAD,
    *,
    observers: Sequence[Observer] = (),
    fresh: bool = False,
) -> Job:
    """A job that was staged, or begun and lost, ready to continue from its last commit.

    Checks the committed state against the records' chain of hashes. Removes any global model or
    state that no record names yet, and the result of a job that failed or was cancelled.

    Args:
        observers: those who follow the job from now on.
        fresh: whether this process has just staged the job.

    Raises:
        FileNotFoundError: the job doesn't exist.
        IntegrityError: the committed state doesn't match its hashes.
        RecipeError: the job has another recipe or other sites.
    """
    paths = JobPaths(job_id)
    data = store.read_bytes(paths.job)
    check_unchanged(recipe, job_id, store, sites.names)
    described = JobRecord.from_bytes(data, store.full(paths.job))
    ledger = _read_ledger(recipe, store, Ledger.of(described, hashlib.sha256(data).hexdigest()))
    step, _ = next_step(recipe, ledger.records)
    committed = Committed(store)
    if not fresh:
        _check_named(recipe, committed, ledger, step)
    if step is None or step.model is None:
        _remove_unnamed(store, ledger)
    for path in (paths.result, paths.cross_site, paths.state(ledger.num_trained)):
        store.remove(path)
    return Job(recipe, store, sites, ledger, committed, look_ahead, observers)


def _read_ledger(recipe: Recipe, store: Store, ledger: Ledger) -> Ledger:
    """Read a job's commits; raises `IntegrityError` at the first record that doesn't follow."""
    paths = JobPaths(ledger.job.job_id)
    while store.exists(path := paths.record(ledger.number)):
        data = store.read_bytes(path)
        record = RoundRecord.from_bytes(data, store.full(path))
        step, _ = next_step(recipe, ledger.records)
        if step is None or record.task != step.task or record.base != (step.model or ledger.head):
            raise IntegrityError(f"{store.full(path)} does not follow from the round before it: verify the job")
        try:
            ledger = ledger.advance(record, hashlib.sha256(data).hexdigest())
        except IntegrityError as error:
            raise IntegrityError(
                f"{store.full(path)} does not follow from the round before it: it {error}; verify the job"
            ) from None
    return ledger


def _check_named(recipe: Recipe, committed: Committed, ledger: Ledger, step: Step | None) -> None:
    """Check that the models and the state that the rest of the job needs are the committed ones."""
    paths, trained = JobPaths(ledger.job.job_id), ledger.num_trained
    named = {paths.global_model(trained): ledger.head}
    if step is not None and step.model is not None:
        named[paths.global_model(ledger.number)] = step.model
    if recipe.starts_own_models:
        named[paths.global_model(0)] = ledger.job.model
    for owed in awaited(ledger.records) if folds(recipe) else ():
        named[paths.global_model(owed.round)] = ledger.records[owed.round].base
    if ledger.state is not None:
        named[paths.state(trained - 1)] = ledger.state
    for path, digest in named.items():
        committed.checked(path, digest)


def _remove_unnamed(store: Store, ledger: Ledger) -> None:
    """Remove the models that the lost round made for the rounds after it."""
    paths, number = JobPaths(ledger.job.job_id), ledger.number + 1
    while store.exists(paths.global_model(number)):
        number += 1
    # The last first: a process killed here leaves no gap.
    for unnamed in reversed(range(ledger.number + 1, number)):
        store.remove(paths.global_model(unnamed))
