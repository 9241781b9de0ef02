"""The start of a job in the store: staging a new job, finding an existing one, forking.

A fork starts from a model of another job. Doesn't load Prefect, because environments call this
before anything runs.
"""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from typing import Any

from fedpool.bundle import MAX_ZIP_BYTES, Bundle
from fedpool.environment import Begin
from fedpool.errors import IntegrityError, RecipeError
from fedpool.flows.own_code import code_of, filter_code_of
from fedpool.flows.recipes import class_name, full_type, type_of
from fedpool.messages import NamedCode
from fedpool.paths import JobPaths, new_job_id
from fedpool.recipe import Recipe
from fedpool.store import Store
from fedpool.stored_model import StoredModel
from fedpool.tasks.arithmetic import CURRENT
from fedpool.tasks.job_record import EnvironmentRecord, JobRecord, JobResult, Parent
from fedpool.tasks.record import RoundRecord, stored_records
from fedpool.tensors import Digest
from fedpool.user_code import Code

_NOT_COMPARED = {"train_script", "initial_ckpt"}
"""Fields of a recipe that may differ when a job is resumed: their contents are in the store."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a job starts.

    Attributes:
        recipe: what to run; a fork's recipe has the model that it starts from.
        job_id: a new id, or that of the job to resume.
        resumes: whether it was begun before.
        parent: the job and round that it is a fork of.
    """

    recipe: Recipe
    job_id: str
    resumes: bool = False
    parent: Parent | None = None


def start_of(recipe: Recipe, store: Store, begin: Begin) -> Start:
    """The start of a job, from the user's choice of a new job, a resumed one or a fork.

    Raises:
        RecipeError: the job or the model to start from doesn't exist.
    """
    if begin.resume is None:
        return Start(recipe, new_job_id(recipe.name))
    if not store.exists(JobPaths(begin.resume).job):
        raise RecipeError(f"there is no job {begin.resume!r} in {store.url}")
    if not begin.fork:
        return Start(recipe, begin.resume, resumes=True)
    number = num_trained(store, begin.resume) if begin.from_round is None else begin.from_round
    parent = Parent(job_id=begin.resume, round=number)
    return Start(_fork(recipe, parent, store), new_job_id(recipe.name), parent=parent)


def num_trained(store: Store, job_id: str) -> int:
    """Number of training rounds that a job has committed, so the number of its newest model."""
    return sum(1 for _ in takewhile(lambda record: record.task == "train", stored_records(store, job_id)))


def num_committed(store: Store, job_id: str) -> int:
    """Number of rounds that a job has committed, including those without training."""
    number, paths = 0, JobPaths(job_id)
    while store.exists(paths.record(number)):
        number += 1
    return number


def has_completed(store: Store, job_id: str) -> bool:
    """Whether a job has completed, so there is nothing to resume."""
    path = JobPaths(job_id).result
    return store.exists(path) and JobResult.read(store, path).status == "COMPLETED"


def check_unchanged(recipe: Recipe, job_id: str, store: Store, sites: Sequence[str]) -> None:
    """Check that a job has this recipe and these sites.

    The values of the recipe's model don't matter, because the job has its own; neither does the
    script's path.

    Raises:
        FileNotFoundError: the job doesn't exist.
        RecipeError: something differs; lists all differences.
    """
    paths = JobPaths(job_id)
    job = JobRecord.read(store, paths.job)
    recorded = type(recipe).recorded(job.recipe)
    there = {"sites": sorted(job.sites), "script": job.bundle_sha256, **recorded}
    here = {"sites": sorted(sites), "script": recipe.bundle.sha256, **_described(recipe)}
    if ":" in there["type"]:
        there["code"], here["code"] = (code and code.sha256 for code in (job.code, code_of(recipe)))
    else:  # of an earlier version, which stored no code
        there["type"] = full_type(there["type"])
        here["type"] = here["type"] if ":" in there["type"] else class_name(here["type"])
    model = store.tensors(paths.global_model(0), job.model.size)
    there["model"] = {name: str(entry) for name, entry in model.spec.items()}
    here["model"] = {name: str(entry) for name, entry in recipe.model.spec.items()}
    differing = sorted(
        name for name in there.keys() | here.keys() if name not in _NOT_COMPARED and there.get(name) != here.get(name)
    )
    if differing:
        what = "\n".join(
            f"{name}: {_brief(there.get(name))} in the job, {_brief(here.get(name))} here" for name in differing
        )
        raise RecipeError(f"job {job_id} was started with another recipe: fork it (fork=True) to change\n{what}")


def _described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as in `job.json`."""
    return {"type": type_of(type(recipe)), **recipe.model_dump(mode="json")}


def _told(full: str, other: str) -> str:
    """The class as shown to people: its name, or in full if the other has the same name."""
    return full if class_name(full) == class_name(other) else class_name(full)


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def stage(
    recipe: Recipe,
    job_id: str,
    store: Store,
    sites: tuple[str, ...],
    *,
    simulated: bool = False,
    template: bool = False,
    parent: Parent | None = None,
    environment: EnvironmentRecord | None = None,
) -> Digest:
    """Write a new job's bundle, initial model and, as the commit, `job.json`; returns the model's
    digest.

    Args:
        simulated: whether only this machine simulates its sites.
        template: whether it never runs itself: a deployment makes its jobs from it.
        parent: the job and round that it is a fork of.
        environment: where and how it runs.
    """
    paths = JobPaths(job_id)
    store.write_bytes(paths.bundle(recipe.bundle.sha256), recipe.bundle.data)
    code, filter_code = code_of(recipe), filter_code_of(recipe)
    travelling = {each.sha256: each.data for each in (code, filter_code) if each is not None}  # often the same
    for sha256, data in travelling.items():
        store.write_bytes(paths.code(sha256), data)
    digest: Digest = recipe.model.digest
    with store.staged(paths.global_model(0)) as file:
        recipe.model.write_to(file)
    job = JobRecord(
        job_id=job_id,
        parent=parent,
        simulated=simulated,
        template=template,
        environment=environment,
        recipe=_described(recipe),
        given=None if recipe.given is None else tuple(sorted(recipe.given)),
        client=recipe.client_job(job_id, digest).model_copy(update={"filter_code": _named(filter_code)}),
        seed=recipe.seed,
        arithmetic_number=CURRENT.number,
        sites=sites,
        bundle_sha256=recipe.bundle.sha256,
        code=_named(code),
        model=digest,
        hole_names=tuple(sorted(recipe.model.holes)),
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("fedpool", "prefect", "torch", "numpy", "safetensors")},
        },
    )
    store.write_json(paths.job, job.as_json())
    return digest


def _named(code: Code | None) -> NamedCode | None:
    return None if code is None else NamedCode(sha256=code.sha256, modules=code.modules)


def restore(kind: type[Recipe], job_id: str, store: Store) -> Recipe:
    """The recipe of a staged job, as in the store.

    Args:
        kind: class of the recipe.

    Raises:
        FileNotFoundError: the job doesn't exist.
        IntegrityError: an object doesn't match the job's `job.json`.
        RecipeError: the job has another kind of recipe.
    """
    paths = JobPaths(job_id)
    job = JobRecord.read(store, paths.job)
    client, found = job.client, full_type(job.kind)
    if found != type_of(kind):
        raise RecipeError(f"job {job_id} has a {_told(found, type_of(kind))}, not a {_told(type_of(kind), found)}")
    data = store.read_bytes(paths.bundle(client.bundle_sha256), MAX_ZIP_BYTES)
    if hashlib.sha256(data).hexdigest() != client.bundle_sha256:
        raise IntegrityError(f"{store.full(paths.bundle(client.bundle_sha256))} does not match the hash in its name")
    model = StoredModel(store, paths.global_model(0), job.model, job.holes)
    bundle = Bundle(client.entry, client.bundle_sha256, client.imports, data)
    known = {**kind.recorded(job.fields), "model": model, "initial_ckpt": None}
    return kind.restore(known, bundle, given=job.given)


def _fork(recipe: Recipe, parent: Parent, store: Store) -> Recipe:
    """A recipe that starts from a model of another job.

    Raises:
        RecipeError: the model doesn't exist, or has other parameters than the recipe's.
    """
    paths = JobPaths(parent.job_id)
    job = JobRecord.read(store, paths.job)  # `start_of` has found it
    known: Digest | None = None
    if parent.round == 0:
        known = job.model
    elif parent.round > 0 and store.exists(path := paths.record(parent.round - 1)):
        known = RoundRecord.read(store, path).next_global
    if known is None:
        raise RecipeError(
            f"{store.full(paths.global_model(parent.round))} is not a model that job {parent.job_id} committed"
        )
    model = StoredModel(store, paths.global_model(parent.round), known, job.holes)
    if dict(model.spec) != dict(recipe.model.spec):
        raise RecipeError(
            f"job {parent.job_id} has a model with other parameters than the recipe's, so it cannot be forked"
        )
    return recipe.revise(model=model, initial_ckpt=None)
