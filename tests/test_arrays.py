"""torch tensors and numpy arrays to safetensors and back: every supported dtype comes back
unchanged.
"""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from fedpool.arrays import (
    ParamsFormat,
    as_bytes,
    describe,
    is_torch,
    load_arrays,
    numpy_dtype,
    save_and_hash,
    torch_block,
    torch_dtype,
)
from fedpool.errors import IntegrityError
from fedpool.tensors import ITEM_SIZES, TensorSpec

CODES = sorted(ITEM_SIZES)


def saved(path: Path, params: dict[str, Any]) -> Path:
    with path.open("wb") as file:
        save_and_hash(file, params)
    return path


def bits(value: Any) -> bytes:
    return bytes(as_bytes(value))


def torch_values(code: str) -> dict[str, torch.Tensor]:
    """Values of every kind of shape, in one dtype."""
    dtype = torch_dtype(code)
    line = torch.tensor([1, 0, 3, 1, 0, 7]).to(dtype)
    return {"scalar": line[0], "line": line, "matrix": line.reshape(2, 3), "empty": torch.empty((0, 4), dtype=dtype)}


@pytest.mark.parametrize("code", CODES)
def test_every_dtype_travels_unchanged_as_torch(code: str, tmp_path: Path) -> None:
    params = torch_values(code)
    loaded = load_arrays(saved(tmp_path / "m", params), "torch")
    assert {n: (v.dtype, v.shape, bits(v)) for n, v in loaded.items()} == {
        n: (v.dtype, v.shape, bits(v)) for n, v in params.items()
    }


@pytest.mark.parametrize("code", CODES)
def test_every_dtype_travels_unchanged_as_numpy(code: str, tmp_path: Path) -> None:
    line = np.array([1, 0, 3, 1, 0, 7]).astype(numpy_dtype(code))
    params = {"scalar": line[0], "line": line, "matrix": line.reshape(2, 3), "empty": line[:0].reshape(0, 4)}
    loaded = load_arrays(saved(tmp_path / "m", params), "numpy")
    assert {n: (v.dtype, v.shape, bits(v)) for n, v in loaded.items()} == {
        n: (v.dtype, v.shape, bits(v)) for n, v in params.items()
    }


@pytest.mark.parametrize("code", CODES)
def test_both_formats_write_the_same_bytes(code: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "torch", torch_values(code))
    again = saved(tmp_path / "numpy", load_arrays(path, "numpy"))
    assert again.read_bytes() == path.read_bytes()


def test_bfloat16_comes_back_as_the_dtype_of_ml_dtypes_in_numpy(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", {"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)})
    loaded = load_arrays(path, "numpy")["w"]
    assert loaded.dtype == ml_dtypes.bfloat16
    assert loaded.astype(np.float32).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_view_that_is_not_contiguous_travels_in_c_order(kind: ParamsFormat, tmp_path: Path) -> None:
    values: Any = torch.arange(6.0).reshape(2, 3) if kind == "torch" else np.arange(6.0).reshape(2, 3)
    loaded = load_arrays(saved(tmp_path / "m", {"w": values.T}), kind)["w"]
    assert loaded.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_big_endian_numpy_arrays_travel_by_value(tmp_path: Path) -> None:
    loaded = load_arrays(saved(tmp_path / "m", {"w": np.array([1.5, -2.0], dtype=">f4")}), "numpy")["w"]
    assert loaded.tolist() == [1.5, -2.0]


def test_parameters_that_require_gradients_travel_detached(tmp_path: Path) -> None:
    loaded = load_arrays(saved(tmp_path / "m", {"w": torch.nn.Parameter(torch.ones(2))}), "torch")["w"]
    assert loaded.tolist() == [1.0, 1.0]
    assert not loaded.requires_grad


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_writing_to_what_was_loaded_does_not_reach_the_file(kind: ParamsFormat, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", {"w": np.zeros(4, dtype=np.float32)})
    before = path.read_bytes()
    load_arrays(path, kind)["w"][:] = 7
    assert path.read_bytes() == before
    assert load_arrays(path, kind)["w"].tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_loaded_names_are_sorted(kind: ParamsFormat, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", {"b": np.zeros(1), "a": np.zeros(1, dtype=bool), "c": np.zeros(1, dtype=np.float16)})
    assert list(load_arrays(path, kind)) == ["a", "b", "c"]


def test_a_broken_file_read_as_numpy_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_bytes(b"no tensors here")
    with pytest.raises(IntegrityError, match="broken is not a valid safetensors file"):
        load_arrays(path, "numpy")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0, 2.0], r"params\['w'\] is a list: give a torch tensor or a numpy array"),
        (3.5, r"params\['w'\] is a float"),
        (np.array([1j]), r"params\['w'\] has dtype complex128: convert it"),
        (torch.tensor([1j]), r"params\['w'\] has dtype torch.complex64: convert it"),
        (np.array(["text"]), r"params\['w'\] has dtype <U4"),
        (np.array([None]), r"params\['w'\] has dtype object"),
    ],
)
def test_what_cannot_travel_is_refused_by_name_with_the_remedy(value: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        save_and_hash(io.BytesIO(), {"w": value})


def test_a_description_holds_dtype_and_shape() -> None:
    assert describe("w", torch.zeros(2, 3, dtype=torch.bfloat16)) == TensorSpec("BF16", (2, 3))
    assert describe("w", np.float64(1.0)) == TensorSpec("F64", ())


def test_only_torch_tensors_are_torch() -> None:
    assert is_torch(torch.zeros(1))
    assert not is_torch(np.zeros(1))


def test_asking_whether_a_value_is_torch_does_not_import_torch() -> None:
    code = "import sys; from fedpool.arrays import is_torch; print(is_torch(1), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_a_torch_block_shares_the_bytes_it_is_made_of() -> None:
    data = bytearray(np.array([1.0, 2.0], dtype=np.float32).tobytes())
    block = torch_block(data, "F32")
    block[0] = 5.0
    assert np.frombuffer(data, np.float32).tolist() == [5.0, 2.0]
    assert torch_block(bytearray(), "I64").dtype == torch.int64
