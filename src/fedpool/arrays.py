"""Conversion between torch tensors or numpy arrays and the bytes of safetensors.

Each import of a framework is in the function that needs it: a script without torch must not pay for
torch, and bfloat16 in numpy needs `ml_dtypes`.
"""

import math
import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedpool.local_file import LocalFile, open_file
from fedpool.tensor_stream import Writable, write_and_hash, write_tensors
from fedpool.tensors import BlockBytes, Digest, TensorReader, Tensors, TensorSpec, blocks_of, file_order, is_beside

if TYPE_CHECKING:
    import numpy as np
    import torch

ParamsFormat = Literal["torch", "numpy"]
CHUNK_ELEMENTS = 1 << 14
"""The most elements that are summed at once; see `chunks`. Stores use multiples of it as blocks."""

_TORCH = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_FROM_SAFETENSORS = {code: name for name, code in _TORCH.items()}


def torch_dtype(code: str) -> "torch.dtype":
    """The torch dtype for a safetensors dtype name."""
    import torch

    dtype: torch.dtype = getattr(torch, _FROM_SAFETENSORS[code])
    return dtype


def numpy_dtype(code: str) -> "np.dtype[Any]":
    """The numpy dtype for a safetensors dtype name; bfloat16 comes from `ml_dtypes`."""
    import numpy as np

    if code == "BF16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(_FROM_SAFETENSORS[code])


def is_torch(value: Any) -> bool:
    """Whether value is a torch tensor. Doesn't import torch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def describe(name: str, value: Any) -> TensorSpec:
    """dtype and shape of a torch tensor, numpy array or numpy scalar.

    Raises:
        TypeError: value is none of these, or its dtype can't be exchanged.
    """
    import numpy as np

    if is_torch(value):
        code = _TORCH.get(str(value.dtype).removeprefix("torch."))
    elif isinstance(value, np.ndarray | np.generic):
        code = _TORCH.get(value.dtype.name)
    else:
        raise TypeError(f"params[{name!r}] is a {type(value).__name__}: give a torch tensor or a numpy array")
    if code is None:
        raise TypeError(f"params[{name!r}] has dtype {value.dtype}: convert it to one of {', '.join(_TORCH)}")
    return TensorSpec(code, tuple(value.shape))


def as_bytes(value: Any) -> memoryview:
    """The elements of a torch tensor or numpy array in C order, as bytes; a view if possible."""
    import numpy as np

    if is_torch(value):
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1)
        return memoryview(flat.view(torch.uint8).numpy())
    array = np.ascontiguousarray(value).reshape(-1)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.view(np.uint8).data


def as_numpy(value: Any) -> "np.ndarray[Any, Any]":
    """A torch tensor as a numpy array of the same dtype, bfloat16 included."""
    import numpy as np

    spec = describe("", value)
    return np.frombuffer(bytearray(as_bytes(value)), numpy_dtype(spec.dtype)).reshape(spec.shape)


def save_arrays(file: Writable, params: Mapping[str, Any]) -> None:
    """Write params (torch tensors or numpy arrays of any shape) as safetensors.

    Raises:
        TypeError: a value isn't an array, or its dtype can't be exchanged.
    """
    spec = {name: describe(name, value) for name, value in params.items()}
    write_tensors(file, spec, (as_bytes(params[name]) for name in file_order(spec)))


def save_and_hash(file: Writable, params: Mapping[str, Any]) -> Digest:
    """Like `save_arrays`; returns the sha256 and size of the written bytes."""
    spec = {name: describe(name, value) for name, value in params.items()}
    return write_and_hash(file, spec, (as_bytes(params[name]) for name in file_order(spec)))


def load_arrays(path: str | Path, params_format: ParamsFormat) -> dict[str, Any]:
    """All tensors of a local safetensors file, in the order of their names.

    torch tensors are views of a private memory map: they are read only when touched, sites on one
    machine share the pages, and writes don't reach the file. numpy arrays are copies.
    """
    if params_format == "torch":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    import numpy as np

    reader = TensorReader(LocalFile(partial(open_file, path)), Path(path).stat().st_size, where=str(path))
    return {
        name: np.frombuffer(
            reader.read_block(name, 0, reader.spec[name].num_elements), numpy_dtype(reader.spec[name].dtype)
        ).reshape(reader.spec[name].shape)
        for name in sorted(reader.spec)
    }


def torch_block(data: BlockBytes, code: str) -> "torch.Tensor":
    """A flat torch tensor over the bytes of a block (shared, not copied)."""
    import torch

    return torch.frombuffer(data, dtype=torch_dtype(code)) if data else torch.empty(0, dtype=torch_dtype(code))


def dtype_limits(code: str) -> tuple[float, float]:
    """The lowest and the highest finite value of a dtype (safetensors name)."""
    import torch

    dtype = torch_dtype(code)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return limits.min, limits.max


def chunks(value: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
    """A block along its last dimension, in the parts that are summed separately.

    Such sums, added in order, have the same bits whatever the block size of the store. `torch.sum`
    doesn't split an input as small as this over its threads. Products of matrices and vectors are
    split, so their bits depend on the number of threads.
    """
    import torch

    return torch.split(value, CHUNK_ELEMENTS, dim=-1)


def difference_norm(
    update: Tensors,
    base: Tensors | None,
    block_elements: int,
    *,
    model: Tensors | None = None,
    holes: Collection[str] = (),
) -> float:
    """L2 norm of an update's difference to a model over all floating point parameters, in float64.

    Args:
        base: the model; None if the update already is the difference.
        model: the model, if it has holes.
        holes: the tensors in which the model needn't be finite. An element that is finite in
            neither the model nor the update has no difference. If it is finite in the update only,
            the difference is taken to 0, as the mean does.
    """
    import torch

    total = 0.0
    for name, start, stop in blocks_of(update.spec, block_elements):
        if update.spec[name].kind != "float" or is_beside(name):
            continue
        value = torch_block(update.read_block(name, start, stop), update.spec[name].dtype).to(torch.float64)
        at = None
        if model is not None and name in holes:
            at = ~torch_block(model.read_block(name, start, stop), model.spec[name].dtype).isfinite()
        if base is not None:
            before = torch_block(base.read_block(name, start, stop), base.spec[name].dtype).to(torch.float64)
            value -= before if at is None else before.masked_fill(at, 0.0)
        if at is not None:
            value[at & ~value.isfinite() if base is not None else at] = 0.0
        for chunk in chunks(value):
            total += chunk.square().sum().item()
    return math.sqrt(total)
