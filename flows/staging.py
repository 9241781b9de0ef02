"""A job's beginnings, in the store: a new one is staged; a lost one is found again; a fork starts from a model of another.

Costs no Prefect, because an environment looks here before anything runs.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from fedpool.bundle import Bundle
from fedpool.errors import IntegrityError, RecipeError
from fedpool.flows.recipes import class_name, full_type, type_of
from fedpool.manifest import ClientJob
from fedpool.paths import JobPaths, new_job_id
from fedpool.recipe import Recipe
from fedpool.store import Store, to_json
from fedpool.stored_model import StoredModel
from fedpool.tasks.arithmetic import CURRENT
from fedpool.tasks.holes import stored_holes
from fedpool.tensors import Digest

JOB_FORMAT = 1

_NOT_COMPARED = {"train_script", "initial_ckpt"}
"""Fields of a recipe that may differ when a job goes on: what they name is in the store."""


@dataclass(frozen=True, slots=True)
class Parent:
    """What a job is a fork of: another one, and the round whose global model it starts from."""

    job_id: str
    round: int


@dataclass(frozen=True, slots=True)
class Start:
    """How a job begins.

    Attributes:
        recipe: what to run; a fork's has the model that it starts from.
        job_id: a new one, or the one that goes on.
        resumes: whether it was begun before.
        parent: what it is a fork of.
    """

    recipe: Recipe
    job_id: str
    resumes: bool
    parent: Parent | None


def begin(recipe: Recipe, store: Store, *, resume: str | None, fork: bool, from_round: int | None) -> Start:
    """How a job begins that was asked for by the arguments of `Recipe.execute`.

    Raises:
        RecipeError: there is no such job, or no such model.
    """
    if resume is None:
        return Start(recipe, new_job_id(recipe.name), False, None)
    if not store.exists(JobPaths(resume).job):
        raise RecipeError(f"there is no job {resume!r} in {store.url}")
    if not fork:
        return Start(recipe, resume, True, None)
    parent = Parent(resume, num_trained(store, resume) if from_round is None else from_round)
    return Start(_fork(recipe, parent, store), new_job_id(recipe.name), False, parent)


def sha256_without(result: Mapping[str, Any]) -> str:
    """What `result.json` says of itself: the hash of what it would be without the field `sha256`."""
    return hashlib.sha256(to_json({name: value for name, value in result.items() if name != "sha256"})).hexdigest()


def num_trained(store: Store, job_id: str) -> int:
    """How many training rounds a job has committed: its newest global model is the one of that round."""
    number, paths = 0, JobPaths(job_id)
    while store.exists(path := paths.record(number)) and store.read_json(path)["task"] == "train":
        number += 1
    return number


def num_committed(store: Store, job_id: str) -> int:
    """How many rounds a job has committed, those that only score or submit models included."""
    number, paths = 0, JobPaths(job_id)
    while store.exists(paths.record(number)):
        number += 1
    return number


def has_completed(store: Store, job_id: str) -> bool:
    """Whether a job has come to its end, so that there is nothing to go on with."""
    path = JobPaths(job_id).result
    return store.exists(path) and store.read_json(path)["status"] == "COMPLETED"


def check_unchanged(recipe: Recipe, job_id: str, store: Store, sites: Sequence[str]) -> None:
    """Check that a job has this recipe and these sites.

    The values of the recipe's model do not matter, because the job has its own; where the script lies does not matter either.

    Raises:
        FileNotFoundError: there is no such job.
        RecipeError: something differs; names all of it.
    """
    paths = JobPaths(job_id)
    described = store.read_json(paths.job)
    recorded = type(recipe).recorded(described["recipe"])
    there = {"sites": sorted(described["sites"]), "script": described["bundle_sha256"], **recorded}
    here = {"sites": sorted(sites), "script": recipe.bundle.sha256, **_described(recipe)}
    there["type"] = full_type(there["type"])
    if ":" not in there["type"]:  # a class of the user's, in a job of an earlier version
        here["type"] = class_name(here["type"])
    model = store.tensors(paths.global_model(0), described["model"]["size"])
    there["model"] = {name: str(entry) for name, entry in model.spec.items()}
    here["model"] = {name: str(entry) for name, entry in recipe.model.spec.items()}
    differing = sorted(
        name for name in there.keys() | here.keys() if name not in _NOT_COMPARED and there.get(name) != here.get(name)
    )
    if differing:
        what = "\n".join(
            f"{name}: {_brief(there.get(name))} there, {_brief(here.get(name))} here" for name in differing
        )
        raise RecipeError(f"job {job_id} was begun with another recipe: fork it (fork=True) to change\n{what}")


def _described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as `job.json` holds it."""
    return {"type": type_of(type(recipe)), **recipe.model_dump(mode="json")}


def _told(full: str, other: str) -> str:
    """A class as people are shown it, by its name, unless that is the other's, too."""
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
) -> Digest:
    """Write a new job's bundle, initial model and, as their commit, `job.json`; returns the initial model's digest.

    Args:
        simulated: its sites are of this machine, and no one else's.
        template: it never runs itself: a deployment makes its jobs from it.
        parent: what it is a fork of.
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
            "parent": asdict(parent) if parent else None,
            "simulated": simulated,
            "template": template,
            "recipe": _described(recipe),
            "given": None if recipe.given is None else sorted(recipe.given),
            "client": recipe.client_job(job_id, digest).model_dump(mode="json"),
            "seed": recipe.seed,
            "arithmetic": CURRENT.number,
            "sites": list(sites),
            "bundle_sha256": recipe.bundle.sha256,
            "model": {"sha256": digest.sha256, "size": digest.size},
            "holes": sorted(recipe.model.holes),
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
        found = full_type(str(fields.pop("type")))
        client = ClientJob.model_validate(record["client"], strict=False)
        digest = Digest(**record["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{store.full(paths.job)} does not describe a job: {error}") from None
    if found != type_of(kind):
        raise RecipeError(f"job {job_id} has a {_told(found, type_of(kind))}, not a {_told(type_of(kind), found)}")
    data = store.read_bytes(paths.bundle(client.bundle_sha256))
    if hashlib.sha256(data).hexdigest() != client.bundle_sha256:
        raise IntegrityError(f"{store.full(paths.bundle(client.bundle_sha256))} is not what its name says")
    model = StoredModel(store, paths.global_model(0), digest, stored_holes(record))
    bundle = Bundle(client.entry, client.bundle_sha256, client.imports, data)
    known = {**kind.recorded(fields), "model": model, "initial_ckpt": None}
    return kind.restore(known, bundle, given=record.get("given"))


def _fork(recipe: Recipe, parent: Parent, store: Store) -> Recipe:
    """A recipe that starts from a model of another job.

    Raises:
        RecipeError: there is no such model, or it has other parameters than the recipe's.
    """
    paths = JobPaths(parent.job_id)
    job = store.read_json(paths.job)  # `begin` has found it
    known: Mapping[str, Any] | None = None
    if parent.round == 0:
        known = job["model"]
    elif parent.round > 0 and store.exists(path := paths.record(parent.round - 1)):
        known = store.read_json(path)["next_global"]
    if known is None:
        raise RecipeError(
            f"{store.full(paths.global_model(parent.round))} is no model that job {parent.job_id} committed"
        )
    model = StoredModel(store, paths.global_model(parent.round), Digest(**known), stored_holes(job))
    if dict(model.spec) != dict(recipe.model.spec):
        raise RecipeError(
            f"job {parent.job_id} has a model with other parameters than the recipe's: it cannot be forked"
        )
    return recipe.revise(model=model, initial_ckpt=None)
