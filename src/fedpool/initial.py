"""The initial model of a job: whatever the user has (a module, a state dict, a checkpoint) as plain tensors, checked."""

import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fedpool.arrays import describe, load_arrays, save_and_hash
from fedpool.errors import RecipeError
from fedpool.tensors import Digest, TensorSpec, Writable

_CHUNK_BYTES = 1 << 20


class InitialModel:
    """The tensors that round 0 starts from: a safetensors file of the recipe's own that has no name any more.

    Training the user's module further does not change it, and a large model is not in memory twice.

    Args:
        spec: name -> dtype and shape.
        digest: sha256 and size of the file.
        file: open; it may be closed and removed afterwards.
    """

    def __init__(self, spec: Mapping[str, TensorSpec], digest: Digest, file: IO[bytes]) -> None:
        self.spec = spec
        self.digest = digest
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def num_parameters(self) -> int:
        """Elements over all tensors."""
        return sum(entry.num_elements for entry in self.spec.values())

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


def initial_model(model: Any, checkpoint: str | Path | None = None) -> InitialModel:
    """The initial model of whatever the user gave.

    Args:
        model: a `torch.nn.Module`, a state dict (torch tensors or numpy arrays), or the path of a safetensors or torch
            checkpoint. Torch checkpoints are read with `weights_only=True`.
        checkpoint: path of a checkpoint whose values replace those of `model`; its keys and shapes must fit.

    Raises:
        RecipeError: nothing of the above, a checkpoint that cannot be read, or one that does not fit.
    """
    if isinstance(model, str | Path):
        params = _load_checkpoint(Path(model))
    elif isinstance(model, type):
        raise RecipeError(f"model is the class {model.__name__}: give an instance, {model.__name__}()")
    elif hasattr(model, "state_dict") and callable(model.state_dict):
        params = model.state_dict()
    elif isinstance(model, Mapping):
        params = model
    else:
        raise RecipeError(
            f"model must be a torch.nn.Module, a state dict, or the path of a checkpoint, got {type(model).__name__}: {model!r}"
        )
    spec = _describe(params, "model")
    if checkpoint is not None:
        loaded = _load_checkpoint(Path(checkpoint))
        _check_fit(spec, _describe(loaded, "initial_ckpt"), checkpoint)
        params = loaded
    with tempfile.NamedTemporaryFile(prefix="fedpool-", suffix=".safetensors") as file:
        digest = save_and_hash(file, {str(name): value for name, value in params.items()})
        file.flush()
        return InitialModel(spec, digest, file)


def _describe(params: Mapping[str, Any], what: str) -> dict[str, TensorSpec]:
    if not params:
        raise RecipeError(f"{what} has no parameters: there is nothing to train")
    try:
        return {str(name): describe(str(name), value) for name, value in params.items()}
    except TypeError as error:
        raise RecipeError(f"{what}: {error}") from None


def _load_checkpoint(path: Path) -> Mapping[str, Any]:
    import torch

    if not path.is_file():
        raise RecipeError(f"checkpoint {str(path)!r} is not a file (looked in {Path.cwd()})")
    try:
        if path.suffix == ".safetensors":
            return load_arrays(path, "torch")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise whatever their parsers meet in a broken file
        raise RecipeError(
            f"checkpoint {str(path)!r} cannot be read as {'safetensors' if path.suffix == '.safetensors' else 'tensors'}: "
            f"{type(error).__name__}: {error}. Save a state dict: torch.save(model.state_dict(), path), or safetensors"
        ) from error
    nested = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
    params = nested if isinstance(nested, Mapping) else loaded
    if not isinstance(params, Mapping):
        raise RecipeError(f"checkpoint {str(path)!r} holds a {type(params).__name__}, not a state dict")
    return params


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
