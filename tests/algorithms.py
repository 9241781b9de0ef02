"""Shared by the tests of algorithms: the example's recipes and clients."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fedpool import Recipe
from fedpool.paths import JobPaths
from fedpool.store import Store

FOLDER = Path(__file__).parents[1] / "examples" / "algorithms"


def _load() -> ModuleType:
    """The example's job, as a module."""
    spec = importlib.util.spec_from_file_location("algorithms_job", FOLDER / "job.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("digits", None)
    return module


EXAMPLE = _load()
"""The example's `job.py`."""
ALGORITHMS = sorted(EXAMPLE.ALGORITHMS)


def recipe_of(name: str, num_rounds: int = 2) -> Recipe:
    recipe: Recipe = EXAMPLE.recipe(name, num_rounds)
    return recipe


def models_of(store: Store, job_id: str) -> list[bytes]:
    """The global models and the strategy's states."""
    paths, num_rounds = JobPaths(job_id), store.read_json(JobPaths(job_id).result)["num_rounds"]
    found = [store.read_bytes(paths.global_model(number)) for number in range(num_rounds + 1)]
    states = [paths.state(number) for number in range(num_rounds)]
    return found + [store.read_bytes(path) for path in states if store.exists(path)]
