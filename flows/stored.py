"""The recipe of a stored job, including its class if that came with the job."""

import sys
from typing import Any

from fedpool.allowed_code import Permission, Request, by_environment
from fedpool.errors import IntegrityError
from fedpool.flows.recipes import BUILT_IN, GROUP, class_name, find_installed, full_type
from fedpool.flows.staging import restore
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.store import Store
from fedpool.stored_code import stored_code
from fedpool.tasks.job_record import JobRecord
from fedpool.training_recipe import TrainingRecipe
from fedpool.user_code import Code, is_loaded, load_code


def recipe_of(
    job_id: str, store: Store, kind: type[Recipe] | None = None, *, allow: Permission = by_environment
) -> Recipe:
    """The recipe of a job, as in the store.

    Args:
        kind: the expected class, if known.
        allow: called before running code that came with the job; refuses by raising.

    Raises:
        FileNotFoundError: the job doesn't exist.
        IntegrityError: an object doesn't match the job's `job.json`, or the class is unknown here.
        RecipeError: the recipe is of another class than `kind`.
        ConfigError: the code may not be run, or can't be imported in this process.
    """
    path = JobPaths(job_id).job
    record = JobRecord.read(store, path)
    full = full_type(record.kind)
    code = None if record.code is None else stored_code(job_id, store, record.code)
    if code is not None and not is_loaded(code):
        where = store.full(JobPaths(job_id).code(code.sha256))
        allow(Request(job_id, full, code.modules, tuple(code.files), code.sha256, where))
        load_code(code)
    kind = (
        kind or _own_class(full, code, store.full(path), trains="num_rounds" in record.fields) or find_installed(full)
    )
    if kind is None:
        if full.partition(":")[0] in ("__main__", "<run_path>"):
            raise IntegrityError(
                f"{store.full(path)} has a recipe of the class {class_name(full)}, which the script that ran the job defines "
                "itself, so the job has no code to load it from: put it into a module beside the script, and run the job again"
            )
        known = ", ".join(map(class_name, BUILT_IN.values()))
        raise IntegrityError(
            f"{store.full(path)} has a recipe of the unknown class {full!r}: known classes are {known}, and those that packages "
            f"register ({GROUP}). A job includes the code of another class if it is defined in a module beside the script"
        )
    return restore(kind, job_id, store)


def _own_class(full: str, code: Code | None, where: str, *, trains: bool) -> type[Recipe] | None:
    """A recipe's class from the job's own code, which is loaded; None if it isn't in it."""
    module, _, name = full.partition(":")
    if code is None or module not in code.modules:
        return None
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise IntegrityError(f"{where} names {full}, which is {found!r}, not a recipe")
    return found if issubclass(found, TrainingRecipe) or not trains else _of_an_earlier_version(found)


def _of_an_earlier_version(kind: type[Recipe]) -> type[Recipe]:
    """A class from when every recipe had the fields of a training, with those fields."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, TrainingRecipe), names)
