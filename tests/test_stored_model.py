"""Only the header of an initial model in a store is read: checked with a store that counts the
bytes read from each object.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from fedpool import FedAvgRecipe, IntegrityError, Recipe
from fedpool.environment import Begin
from fedpool.flows.staging import check_unchanged, stage, start_of
from fedpool.flows.stored import recipe_of
from fedpool.initial import initial_model
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.stored_model import StoredModel
from fedpool.testing.faults import FaultyFileSystem
from tests.conftest import ADD_ONE

JOB = "large-20261129-120000-abcdef"
MODEL = JobPaths(JOB).global_model(0)
NUM_BYTES = 8 << 20


class CountingFileSystem(FaultyFileSystem):
    """Counts the bytes read from each object."""

    protocol = "counting"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.read: dict[str, int] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return os.path.abspath(path.removeprefix("counting://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data = super().cat_file(path, start, end, **options)
        self.read[path] = self.read.get(path, 0) + len(data)
        return data


@pytest.fixture
def store(tmp_path: Path) -> Store:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    made = Store(f"counting://{tmp_path}/store")
    assert not made.is_local
    return made


@pytest.fixture
def recipe(write_script: Callable[..., Path]) -> Recipe:
    return FedAvgRecipe(
        name="large",
        min_clients=1,
        num_rounds=1,
        model={"w": np.arange(NUM_BYTES // 4, dtype=np.float32), "b": np.ones(3)},
        train_script=write_script(ADD_ONE),
    )


def read_of_model(store: Store) -> int:
    return sum(count for path, count in store.fs.read.items() if path.endswith("global.safetensors"))


def test_a_recipe_comes_back_by_the_header_of_its_model(store: Store, recipe: Recipe) -> None:
    stage(recipe, JOB, store, ("site-1",))
    again = recipe_of(JOB, store)
    check_unchanged(again, JOB, store, ("site-1",))
    assert again.model.spec == recipe.model.spec and again.model.digest == recipe.model.digest
    assert 0 < read_of_model(store) < 2000


def test_a_fork_reads_the_model_once_to_write_it(store: Store, recipe: Recipe) -> None:
    stage(recipe, JOB, store, ("site-1",))
    start = start_of(recipe, store, Begin(JOB, fork=True, from_round=0))
    assert read_of_model(store) < 2000
    stage(start.recipe, start.job_id, store, ("site-1",), parent=start.parent)
    assert read_of_model(store) < NUM_BYTES + 3000
    assert store.read_bytes(JobPaths(start.job_id).global_model(0)) == store.read_bytes(MODEL)


def test_its_tensors_are_those_of_the_file(store: Store, recipe: Recipe) -> None:
    stage(recipe, JOB, store, ("site-1",))
    params = recipe_of(JOB, store).model.params
    assert {name: value.tolist() for name, value in params.items() if name == "b"} == {"b": [1.0, 1.0, 1.0]}
    assert int(params["w"][-1]) == NUM_BYTES // 4 - 1


def test_bytes_that_were_changed_are_refused_when_they_are_used(tmp_path: Path, recipe: Recipe) -> None:
    store = Store(tmp_path / "local")
    stage(recipe, JOB, store, ("site-1",))
    with (tmp_path / "local" / MODEL).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"!")
    model = StoredModel(store, MODEL, recipe.model.digest, None)
    with (
        pytest.raises(IntegrityError, match=r"global\.safetensors differs from its manifest"),
        store.staged("copy") as copy,
    ):
        model.write_to(copy)
    assert not store.exists("copy")
    with pytest.raises(IntegrityError, match=r"global\.safetensors differs from its manifest"):
        _ = model.params


def test_a_model_that_is_given_is_kept_as_before(recipe: Recipe) -> None:
    assert type(recipe.model) is type(initial_model({"w": np.zeros(1)}))
