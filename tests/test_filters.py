"""Filters: an update comes back as it was sent, nothing depends on the blocks, and an error names
its filter.
"""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fedpool import ElementwiseFilter, FedAvgRecipe, Filter, FilterContext, FilterError, RecipeError
from fedpool.arrays import CHUNK_ELEMENTS, save_arrays, torch_block
from fedpool.filter_field import read_filters
from fedpool.filters import BlockRange, ComputedTensors, Passage, described
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery
from fedpool.store import Store
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Rejected, judge
from fedpool.tensors import TensorReader, Tensors, TensorSpec, blocks_of
from tests.updates import sent_by


class Scaling(ElementwiseFilter):
    """Sends multiples of the values."""

    factor: float = Field(default=8.0, description="the factor", gt=0)

    def outgoing_values(self, values: Any, block: Any, context: Any) -> Any:
        return values * self.factor

    def incoming_values(self, values: Any, block: Any, context: Any) -> Any:
        return values / self.factor


class Half(ElementwiseFilter):
    """Sends two bytes per value."""

    def wire_dtype(self, name: str, spec: TensorSpec) -> str:
        return "F16"


class Masked(ElementwiseFilter):
    """Masks values with random numbers from the context's seed."""

    def _mask(self, block: BlockRange, context: FilterContext) -> Any:
        return context.draw(block, lambda count, generator: torch.randn(count, generator=generator))

    def outgoing_values(self, values: Any, block: Any, context: Any) -> Any:
        return values + self._mask(block, context)

    def incoming_values(self, values: Any, block: Any, context: Any) -> Any:
        return values - self._mask(block, context)


class Renamed(Filter):
    """Sends tensors under another name and in another shape."""

    def outgoing(self, update: Tensors, context: FilterContext) -> Tensors:
        spec = {f"x.{name}": TensorSpec(entry.dtype, (entry.num_elements,)) for name, entry in update.spec.items()}
        return ComputedTensors(spec, lambda name, start, stop: update.read_block(name[2:], start, stop))

    def incoming(self, update: Tensors, context: FilterContext) -> Tensors:
        spec = {
            name[2:]: TensorSpec(entry.dtype, context.base.spec[name[2:]].shape) for name, entry in update.spec.items()
        }
        return ComputedTensors(spec, lambda name, start, stop: update.read_block(f"x.{name}", start, stop))


class Failing(ElementwiseFilter):
    """Cannot undo what it does."""

    def incoming_values(self, values: Any, block: Any, context: Any) -> Any:
        raise ValueError("no key")


class Short(ElementwiseFilter):
    """Loses a value."""

    def outgoing_values(self, values: Any, block: Any, context: Any) -> Any:
        return values[1:]


class Odd(Filter):
    """Makes tensors that can't exist, in one of several ways."""

    how: str
    back: bool = False

    def outgoing(self, update: Tensors, context: FilterContext) -> Tensors:
        return update if self.back else self._odd(update)

    def incoming(self, update: Tensors, context: FilterContext) -> Tensors:
        return self._odd(update)

    def _odd(self, update: Tensors) -> Tensors:
        spec = {
            "shape": {"w": TensorSpec("F32", (-1,))},
            "size": {"w": TensorSpec("F32", (1.5,))},  # type: ignore[arg-type]
            "reserved": {"__metadata__": TensorSpec("F32", (3,))},
            "number": {7: TensorSpec("F32", (3,))},
        }.get(self.how, update.spec)
        return ComputedTensors(spec, self._read)  # type: ignore[arg-type]

    def _read(self, name: str, start: int, stop: int) -> Any:
        if self.how == "leaves":
            raise SystemExit(3)
        return "text" if self.how == "text" else None


ODD = {
    "shape": "w has shape (-1,): use a tuple of whole numbers from 0",
    "size": "w has shape (1.5,): use a tuple of whole numbers from 0",
    "reserved": "a tensor cannot be called '__metadata__', because safetensors keeps that name for itself: give it another",
    "number": "a tensor cannot be called 7, because a name is text",
    "text": "TypeError: memoryview: a bytes-like object is required, not 'str'",
    "none": "TypeError: memoryview: a bytes-like object is required, not 'NoneType'",
    "leaves": "SystemExit: 3",
}


def tensors(**params: Any) -> TensorReader:
    file = io.BytesIO()
    save_arrays(file, params)
    data = file.getvalue()
    return TensorReader(lambda start, stop: bytearray(data[start:stop]), len(data), where="the update")


def values(of: Tensors, name: str, num_elements: int = 1 << 20) -> torch.Tensor:
    blocks = [block for block in blocks_of(of.spec, num_elements) if block[0] == name]
    return torch.cat([torch_block(of.read_block(*block), of.spec[name].dtype) for block in blocks])


def passage(base: Tensors) -> Passage:
    return Passage("site-1", 3, 42, base)


floats = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20)


@given(floats)
def test_what_comes_back_is_what_was_sent(numbers: list[float]) -> None:
    update = tensors(w=np.array(numbers, np.float32), n=np.array([3]))
    on_its_way = passage(update).send((Scaling(), Renamed(), Scaling(factor=0.25)), update)
    assert set(on_its_way.spec) == {"x.w", "x.n"}
    back = passage(update).take_back((Scaling(), Renamed(), Scaling(factor=0.25)), on_its_way)
    assert values(back, "w").tolist() == numbers and back.spec == update.spec and values(back, "n").tolist() == [3]


@given(floats)
def test_masks_come_off_to_the_rounding_of_a_float(numbers: list[float]) -> None:
    update = tensors(w=np.array(numbers, np.float32))
    back = passage(update).take_back((Masked(),), passage(update).send((Masked(),), update))
    assert np.allclose(values(back, "w"), numbers, rtol=0, atol=2e-4)


def test_another_dtype_travels_and_the_models_comes_back() -> None:
    base = tensors(w=torch.zeros(2), b=torch.zeros(1, dtype=torch.bfloat16), n=torch.tensor([1]))
    update = tensors(w=torch.tensor([0.5, 2.0]), b=torch.ones(1, dtype=torch.bfloat16), n=torch.tensor([1]))
    way = passage(base).send((Half(),), update)
    assert {name: entry.dtype for name, entry in way.spec.items()} == {"w": "F16", "b": "F16", "n": "I64"}
    back = passage(base).take_back((Half(),), way)
    assert back.spec == update.spec and values(back, "w").tolist() == [0.5, 2.0]


def test_random_numbers_do_not_depend_on_the_blocks_of_a_store() -> None:
    update = tensors(w=np.zeros(2 * CHUNK_ELEMENTS + 5, np.float32))
    way = passage(update).send((Masked(),), update)
    assert torch.equal(values(way, "w"), values(way, "w", CHUNK_ELEMENTS))
    assert torch.equal(values(way, "w", 7_000), values(way, "w"))
    other = Passage("site-2", 3, 42, update).send((Masked(),), update)
    assert not torch.equal(values(way, "w"), values(other, "w"))


def test_an_error_bears_the_name_of_its_filter_and_that_of_the_file_stays_the_files() -> None:
    update = tensors(w=np.ones(3, np.float32))
    back = passage(update).take_back((Scaling(), Failing()), update)
    with pytest.raises(FilterError, match="filter Failing: ValueError: no key"):
        back.read_block("w", 0, 3)
    with pytest.raises(FilterError, match=r"filter Short: w: 8 bytes, but F32 \[3\] has 12"):
        passage(update).send((Short(),), update).read_block("w", 0, 3)

    def lost(name: str, start: int, stop: int) -> bytearray:
        raise FileNotFoundError("the update")

    with pytest.raises(FileNotFoundError, match="the update"):
        passage(update).send((Scaling(),), ComputedTensors(update.spec, lost)).read_block("w", 0, 3)


class AtTheGate:
    """An update that has passed some filters, and the gate that undoes them."""

    def __init__(self, folder: Path, named: tuple[Filter, ...], wanted: tuple[Filter, ...]) -> None:
        store, base = Store(folder), tensors(w=np.zeros(3, np.float32))
        with store.staged(JobPaths("job-1").update(2, "site-1")) as file:
            way = Passage("site-1", 2, 0, base).send(named, tensors(w=np.array([1, 2, 3], np.float32)))
            params = {name: values(way, name).reshape(entry.shape) for name, entry in way.spec.items()}
            save_arrays(file, params)
        data = store.read_bytes(JobPaths("job-1").update(2, "site-1"))
        manifest = sent_by(
            site="site-1", round=2, base_sha256="b" * 64, params_type="FULL", sha256=hashlib.sha256(data).hexdigest(),
            size=len(data), filters=described(named),
        )  # fmt: skip
        expected = Expected("job-1", 2, "train", "b" * 64, base.spec, "FULL", base, filters=wanted, max_norm=100.0)
        self.outcome = judge(store, "site-1", 0, Delivery(manifest, "m" * 64), expected)


@pytest.mark.parametrize("filters", [(), (Scaling(),), (Half(), Scaling(), Renamed()), (Masked(),)])
def test_the_gate_sees_the_update_as_it_was(filters: tuple[Filter, ...], tmp_path: Path) -> None:
    outcome = AtTheGate(tmp_path, filters, filters).outcome
    assert isinstance(outcome, Accepted), outcome
    assert outcome.tensors is not None
    assert np.allclose(values(outcome.tensors, "w"), [1, 2, 3], atol=1e-6)
    assert outcome.norm == pytest.approx(14**0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("named", "wanted", "code", "words"),
    [
        ((), (Scaling(),), "filters", "names the filters [], the recipe has [{'type': 'tests.test_filters:Scaling', 'f"),
        ((Scaling(factor=2),), (Scaling(),), "filters", "'factor': 2.0"),
        ((Failing(),), (Failing(),), "filter", "filter Failing: ValueError: no key"),
    ],
)  # fmt: skip
def test_the_gate_rejects_what_has_passed_others_or_cannot_be_undone(
    named: tuple[Filter, ...], wanted: tuple[Filter, ...], code: str, words: str, tmp_path: Path
) -> None:
    outcome = AtTheGate(tmp_path, named, wanted).outcome
    assert isinstance(outcome, Rejected)
    assert outcome.code == code and words in outcome.reason


@pytest.mark.parametrize("how", ODD)
def test_tensors_that_cannot_exist_fail_the_filter_and_so_one_site_alone(how: str, tmp_path: Path) -> None:
    update = tensors(w=np.ones(3, np.float32))
    with pytest.raises(FilterError) as failed:
        passage(update).send((Odd(how=how),), update).read_block("w", 0, 3)
    assert str(failed.value).startswith("filter Odd: ") and ODD[how] in str(failed.value)
    outcome = AtTheGate(tmp_path, (Odd(how=how, back=True),), (Odd(how=how, back=True),)).outcome
    assert isinstance(outcome, Rejected)
    assert outcome.code == "filter" and ODD[how] in outcome.reason


def test_a_recipes_filters_are_json_and_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("import fedpool.client\n")
    fields: dict[str, Any] = {"name": "j", "min_clients": 1, "num_rounds": 1, "model": {"w": np.zeros(1)}}
    recipe = FedAvgRecipe(**fields, train_script=str(tmp_path / "client.py"), filters=Scaling(factor=2))
    written = recipe.model_dump(mode="json")["filters"]
    assert written == [{"type": "tests.test_filters:Scaling", "factor": 2.0}]
    assert read_filters(written) == recipe.filters == (Scaling(factor=2),)
    with pytest.raises(RecipeError, match="filter 'nowhere:Scaling' is not known here"):
        read_filters([{"type": "nowhere:Scaling"}])
    with pytest.raises(RecipeError, match="filters has 'scaling', which is not a Filter"):
        recipe.revise(filters=["scaling"])

    class Inside(Filter):
        """Cannot be found by its path."""

    with pytest.raises(RecipeError, match="Inside cannot be imported by its path: define its class at the top"):
        recipe.revise(filters=(Inside(),))
    assert "nowhere" not in sys.modules
