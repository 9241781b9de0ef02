"""What leaves a site: nothing that is excluded, differences if the recipe asks for them, and the
filters' output for the rest.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from fedpool.arrays import load_arrays, save_and_hash
from fedpool.errors import SiteError
from fedpool.filters import ElementwiseFilter, Filter
from fedpool.messages import SiteAssignment, Task
from fedpool.sites.outgoing import Outgoing, ParamsKind
from fedpool.store import Store
from tests.test_filters import ODD, Odd
from tests.updates import client_job


class Failing(ElementwiseFilter):
    """Fails at the site."""

    def outgoing_values(self, values: Any, block: Any, context: Any) -> Any:
        raise RuntimeError("no key")


class Reads(ElementwiseFilter):
    """Reads the global model."""

    def outgoing_values(self, values: Any, block: Any, context: Any) -> Any:
        context.base.read_block(block.name, block.start, block.stop)
        return values


class Halves(ElementwiseFilter):
    """Sends half of each value."""

    def outgoing_values(self, values: Any, block: Any, context: Any) -> Any:
        return values / 2


class Site:
    """A site whose script has written an update."""

    def __init__(self, folder: Path, base: Mapping[str, Any], written: Mapping[str, Any]) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.lines: list[str] = []
        with (folder / "model").open("wb") as file:
            self.base = save_and_hash(file, base)
        with (folder / "update").open("wb") as file:
            save_and_hash(file, written)

    def leaves(
        self, *filters: Filter, said: ParamsKind = "FULL", transfer: str = "FULL", task: Task = "train", **job: Any
    ) -> tuple[dict[str, Any], ParamsKind]:
        asked = SiteAssignment(
            site="site-1",
            round=0,
            task=task,
            base_sha256=self.base.sha256,
            base_size=self.base.size,
            timeout_s=None,
        )
        outgoing = Outgoing(client_job(transfer=transfer, **job), asked, filters, self.lines.append)
        written, leaving, model = (self.folder / name for name in ("update", "leaving", "model"))
        seen, kind = outgoing.deliver(written, leaving, model, said, self.store, "there")
        assert seen.digest.size == self.store.size("there")
        return load_arrays(self.store.full("there"), "torch"), kind


BASE = {"body": np.zeros(2, np.float32), "head": np.ones(2, np.float32)}
TRAINED = {
    "body": np.full(2, 3, np.float32),
    "head": np.full(2, 7, np.float32),
    "control::head": np.ones(2, np.float32),
}


@pytest.mark.parametrize("how", ODD)
def test_a_filter_that_makes_tensors_that_cannot_exist_fails_its_site_alone(tmp_path: Path, how: str) -> None:
    site = Site(tmp_path, {"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)})
    with pytest.raises(SiteError, match=r"^site-1, round 0: its update cannot leave: filter Odd: ") as failed:
        site.leaves(Odd(how=how))
    assert ODD[how] in str(failed.value) and not site.store.exists("there")


def test_what_nothing_is_done_to_is_moved_and_not_written_again(tmp_path: Path) -> None:
    site = Site(tmp_path, BASE, TRAINED)
    before = (tmp_path / "update").stat().st_ino
    found, kind = site.leaves()
    assert set(found) == set(TRAINED) and kind == "FULL"
    assert Path(site.store.full("there")).stat().st_ino == before and not (tmp_path / "update").exists()


@pytest.mark.parametrize("said", ["FULL", "DIFF"])
def test_what_is_excluded_stays_whatever_the_script_has_written(said: ParamsKind, tmp_path: Path) -> None:
    site = Site(tmp_path, BASE, TRAINED)
    found, _ = site.leaves(said=said, exclude=("^head",))
    assert set(found) == {"body"}
    assert site.lines == ["these parameters stay here, because the recipe excludes them: control::head, head"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]


@pytest.mark.parametrize("params_format", ["torch", "numpy"])
def test_the_host_subtracts_the_model_where_the_recipe_asks_for_differences(params_format: Any, tmp_path: Path) -> None:
    base = {
        "w": np.array([1.0, 2.0], dtype=np.float32),
        "half": np.array([1.0], dtype=ml_dtypes.bfloat16),
        "count": np.array(10),
        "byte": np.array([200, 3], dtype=np.uint8),
        "mask": np.array([True, False]),
    }
    trained = {
        "w": np.array([1.5, 1.0], dtype=np.float32),
        "half": np.array([1.5], dtype=ml_dtypes.bfloat16),
        "count": np.array(7),
        "byte": np.array([100, 255], dtype=np.uint8),
        "mask": np.array([True, True]),
    }
    site = Site(tmp_path, base, trained)
    found, kind = site.leaves(transfer="DIFF")
    assert kind == "DIFF"
    assert {name: (str(value.dtype), value.tolist()) for name, value in found.items()} == {
        "w": ("torch.float32", [0.5, -1.0]),
        "half": ("torch.bfloat16", [0.5]),
        "count": ("torch.int64", -3),
        "byte": ("torch.int64", [-100, 252]),  # unsigned integers would wrap around
        "mask": ("torch.bool", [True, True]),  # a boolean has no difference, so its value is sent
    }


def test_what_has_no_base_to_subtract_leaves_as_it_is_for_the_gate_to_judge(tmp_path: Path) -> None:
    written = {"body": np.ones(5, np.float32), "unknown": np.ones(1, np.float32)}
    found, _ = Site(tmp_path, BASE, written).leaves(transfer="DIFF")
    assert {name: value.tolist() for name, value in found.items()} == {"body": [1.0] * 5, "unknown": [1.0]}


def test_a_difference_that_a_script_declares_is_not_subtracted_again(tmp_path: Path) -> None:
    found, kind = Site(tmp_path, BASE, TRAINED).leaves(said="DIFF", transfer="DIFF")
    assert found["head"].tolist() == [7, 7] and kind == "DIFF"


def test_a_submitted_model_leaves_as_a_whole(tmp_path: Path) -> None:
    found, kind = Site(tmp_path, BASE, TRAINED).leaves(task="submit_model", transfer="DIFF")
    assert found["head"].tolist() == [7, 7] and kind == "FULL"


def test_filters_come_after_the_hosts_own_steps(tmp_path: Path) -> None:
    found, _ = Site(tmp_path, BASE, TRAINED).leaves(Halves(), transfer="DIFF", exclude=("body",))
    assert {name: value.tolist() for name, value in found.items()} == {"head": [3, 3], "control::head": [0.5, 0.5]}


def test_a_filter_that_fails_is_named_and_nothing_leaves(tmp_path: Path) -> None:
    site = Site(tmp_path, BASE, TRAINED)
    with pytest.raises(SiteError, match="its update cannot leave: filter Failing: RuntimeError: no key"):
        site.leaves(Failing())
    assert not site.store.exists("there")


@pytest.mark.parametrize("kind", ["a FIFO", "a symbolic link"])
def test_only_a_regular_file_of_the_scripts_own_leaves(kind: str, tmp_path: Path) -> None:
    site = Site(tmp_path, BASE, TRAINED)
    (tmp_path / "update").rename(tmp_path / "patients")
    if kind == "a FIFO":
        os.mkfifo(tmp_path / "update")
    else:
        (tmp_path / "update").symlink_to(tmp_path / "patients")
    with pytest.raises(SiteError, match=f"its script has left no usable update: .*update is {kind}"):
        site.leaves()
    assert not site.store.exists("there")


def test_the_host_does_not_write_through_a_link_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("dear diary")
    (tmp_path / "leaving-update").symlink_to(tmp_path / "diary")
    Site(tmp_path, BASE, TRAINED).leaves(transfer="DIFF")
    assert (tmp_path / "diary").read_text() == "dear diary"


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
def test_nothing_that_was_computed_with_another_model_leaves(transfer: str, tmp_path: Path) -> None:
    site = Site(tmp_path, BASE, TRAINED)
    with (tmp_path / "model").open("r+b") as file:
        save_and_hash(file, {name: value + 1000 for name, value in BASE.items()})
    with pytest.raises(SiteError, match=r"its update cannot leave: .*model differs from its manifest"):
        site.leaves(*([Reads()] if transfer == "FULL" else []), transfer=transfer)
    assert not site.store.exists("there")


def test_a_difference_of_torch_is_that_of_the_host(tmp_path: Path) -> None:
    before, after = torch.randn(1000), torch.randn(1000)
    found, _ = Site(tmp_path, {"w": before}, {"w": after}).leaves(transfer="DIFF")
    assert torch.equal(found["w"], after - before)
