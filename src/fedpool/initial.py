"""A job's initial model: a user's module, state dict or checkpoint as plain tensors, checked."""

import os
import re
import tempfile
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from fedpool.arrays import describe, is_torch, load_arrays, save_and_hash
from fedpool.checkpoint import fit_names, is_class_path, load_checkpoint, make_model, unwrap
from fedpool.errors import RecipeError
from fedpool.refusals import explained
from fedpool.tensor_stream import Writable
from fedpool.tensors import Digest, TensorSpec

_CHUNK_BYTES = 1 << 20


class InitialModel:
    """The tensors that round 0 starts from, in the recipe's own unlinked safetensors file.

    Training the user's module further doesn't change them, and a large model isn't in memory twice.

    Args:
        spec: name -> dtype and shape.
        digest: sha256 and size of the file.
        file: open; it may be closed and removed afterwards.
        holes: names of the tensors that contain NaN or infinity; see `fedpool.tasks.holes`.
        unusable: those of them that can't be intended -> why: NaN, or infinity in a trained
            parameter.
    """

    _unusable: Mapping[str, str] = {}

    def __init__(
        self,
        spec: Mapping[str, TensorSpec],
        digest: Digest,
        file: IO[bytes],
        *,
        holes: Collection[str] = (),
        unusable: Mapping[str, str] | None = None,
    ) -> None:
        self.spec = spec
        self.digest = digest
        self._holes = frozenset(holes)
        self._unusable = unusable or {}
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(entry.num_elements for entry in self.spec.values())

    @property
    def holes(self) -> frozenset[str]:
        """Names of the tensors that contain NaN or infinity."""
        return self._holes

    def check_finite(self, left_out: Collection[str]) -> None:
        """Check that all values to exchange are finite, or infinities that may be intended.

        Args:
            left_out: names of the tensors that aren't exchanged.

        Raises:
            RecipeError: a tensor has such values; the message has its name and the remedy.
        """
        for name, why in self._unusable.items():
            if name not in left_out:
                raise RecipeError(
                    f"model: {name} holds {why}: give finite values, or keep the tensor at the sites with "
                    f"exclude_vars={'^' + re.escape(name) + '$'!r}"
                )

    @property
    def params(self) -> Mapping[str, Any]:
        """name -> torch tensor, memory-mapped."""
        return load_arrays(f"/dev/fd/{self._descriptor}", "torch")

    def write_to(self, file: Writable) -> None:
        """Copy the file's bytes."""
        offset = 0
        while chunk := os.pread(self._descriptor, _CHUNK_BYTES, offset):
            file.write(chunk)
            offset += len(chunk)


def initial_model(model: Any, checkpoint: str | Path | None = None, *, folder: Path | None = None) -> InitialModel:
    """Make an initial model from what the user gave.

    Args:
        model: a `torch.nn.Module`, a state dict (torch tensors or numpy arrays), the path of a
            checkpoint (see `load_checkpoint`), or `{"class_path": "package.module.Net", "args":
            {...}}`.
        checkpoint: path of a checkpoint whose values replace those of `model`. Names and shapes
            must match, apart from the prefixes that DataParallel and torch.compile add to names.
        folder: another folder to find a class path in: the client script's.

    Raises:
        RecipeError: the model is none of these, its values can't be exchanged, or the checkpoint
            can't be read or doesn't fit.
    """
    if isinstance(model, Mapping) and is_class_path(model):
        model = make_model(model, folder)
    params = _params(model)
    spec = _describe(params, "model")
    if checkpoint is not None:
        loaded = load_checkpoint(Path(checkpoint), only=next(iter(spec)) if len(spec) == 1 else None)
        params = fit_names(loaded, spec)
        _check_fit(spec, _describe(params, "initial_ckpt"), checkpoint)
    for name, value in params.items():
        if is_torch(value) and value.is_meta:
            raise RecipeError(
                f"model: params[{name!r}] is on the meta device, where it has a shape but no values: give a checkpoint as "
                "initial_ckpt, or create the model on the CPU (net.to_empty(device='cpu'), then initialise it)"
            )
    with (
        explained(tempfile.gettempdir()),
        tempfile.NamedTemporaryFile(prefix="fedpool-", suffix=".safetensors") as file,
    ):
        try:
            digest = save_and_hash(file, {str(name): value for name, value in params.items()})
        except (RuntimeError, NotImplementedError) as error:  # some kinds of tensors have no bytes of their own
            raise RecipeError(
                f"model: its values cannot be read ({type(error).__name__}: {error}): give a state dict of plain tensors"
            ) from error
        file.flush()
        kinds = {str(name): kind for name, value in params.items() if (kind := _not_finite(value))}
        trained = _trained(model)
        unusable = {
            name: f"{kind} and is trained" if name in trained else kind
            for name, kind in kinds.items()
            if kind == "NaN" or name in trained
        }
        return InitialModel(spec, digest, file, holes=kinds, unusable=unusable)


def _params(model: Any) -> Mapping[str, Any]:
    """The user's model as a state dict."""
    if isinstance(model, str | Path):
        return load_checkpoint(Path(model))
    if isinstance(model, type):
        raise RecipeError(f"model is the class {model.__name__}: give an instance, {model.__name__}()")
    if hasattr(model, "state_dict") and callable(model.state_dict):
        try:
            return dict(model.state_dict())
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise RecipeError(
                f"model.state_dict() raised {type(error).__name__}: {error}: give a state dict of plain tensors"
            ) from error
    if isinstance(model, Mapping):
        found: Mapping[str, Any] = unwrap(model)
        return found
    raise RecipeError(
        f"model must be a torch.nn.Module, a state dict, or the path of a checkpoint, got {type(model).__name__}: {model!r}"
    )


def _trained(model: Any) -> frozenset[str]:
    """Names of a module's trainable parameters; for anything else they aren't known."""
    if not hasattr(model, "named_parameters"):
        return frozenset()
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _not_finite(value: Any) -> str | None:
    """The kind of a tensor's non-finite values, in words; None if all are finite."""
    import numpy as np

    if is_torch(value):
        if not value.is_floating_point() or bool(value.isfinite().all()):
            return None
        return "NaN" if bool(value.isnan().any()) else "infinity"
    if describe("", value).kind != "float" or bool(np.isfinite(value).all()):
        return None
    return "NaN" if bool(np.isnan(value).any()) else "infinity"


def _describe(params: Mapping[str, Any], what: str) -> dict[str, TensorSpec]:
    if not params:
        raise RecipeError(f"{what} has no parameters: there is nothing to train")
    for name, value in params.items():
        if is_torch(value) and (why := _unusable(value)) is not None:
            raise RecipeError(f"{what}: params[{str(name)!r}] {why}")
    try:
        return {str(name): describe(str(name), value) for name, value in params.items()}
    except TypeError as error:
        raise RecipeError(f"{what}: {error}") from None


def _unusable(value: Any) -> str | None:
    """Why a torch tensor can't be exchanged, with the remedy; None if it can."""
    import torch
    from torch.nn.parameter import is_lazy

    if is_lazy(value):
        return "has no shape yet, because its module is lazy: run a batch through the model first"
    if hasattr(value, "full_tensor"):
        return "is sharded across processes: gather it with full_tensor()"
    if value.is_nested:
        return "is a nested tensor: pad it with to_padded_tensor()"
    if value.layout is not torch.strided:
        return f"is sparse ({value.layout}): make it dense with to_dense()"
    if value.is_quantized:
        return f"is quantised ({value.dtype}): exchange the model from before quantisation, or dequantize() it"
    if value.is_complex():
        return f"is complex ({value.dtype}): exchange its real and imaginary parts with torch.view_as_real()"
    return None


def _check_fit(model: Mapping[str, TensorSpec], checkpoint: Mapping[str, TensorSpec], path: Any) -> None:
    problems = [f"{name} is missing" for name in sorted(model.keys() - checkpoint.keys())]
    problems += [f"{name} is not in the model" for name in sorted(checkpoint.keys() - model.keys())]
    problems += [
        f"{name}: expected {model[name]}, got {checkpoint[name]}"
        for name in sorted(model.keys() & checkpoint.keys())
        if model[name] != checkpoint[name]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise RecipeError(f"initial_ckpt {str(path)!r} does not fit the model: {'; '.join(problems[:5])}{more}")
