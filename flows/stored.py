"""The recipe of a job that lies in the store, made of what lies there."""

from fedpool.errors import IntegrityError
from fedpool.flows.recipes import BUILT_IN, class_name, find_installed, full_type
from fedpool.flows.staging import restore
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.store import Store
from fedpool.tasks.job_record import JobRecord


def recipe_of(job_id: str, store: Store, kind: type[Recipe] | None = None) -> Recipe:
    """The recipe of a job, as the store holds it.

    Args:
        kind: what its class has to be, if that is known.

    Raises:
        FileNotFoundError: there is no such job.
        IntegrityError: what lies there is not what its `job.json` says, or of a class that is not known here.
        RecipeError: it is of another class than `kind`.
    """
    path = JobPaths(job_id).job
    full = full_type(JobRecord.read(store, path).kind)
    kind = kind or find_installed(full)
    if kind is None:
        known = ", ".join(map(class_name, BUILT_IN.values()))
        raise IntegrityError(f"{store.full(path)} has a recipe of class {full!r}: known are {known}")
    return restore(kind, job_id, store)
