"""Usual forms of checkpoints and models: wrapped, nested, prefixed, numpy files, class paths."""

import importlib
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedpool.arrays import load_arrays
from fedpool.errors import RecipeError

_NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training loops save the state dict, next to the optimizer's."""
_WRAPPERS = ("module", "_orig_mod")
"""Prefixes that DataParallel and torch.compile add to names."""
_CLASS = ("class_path", "path")


def load_checkpoint(path: Path, *, only: str | None = None) -> Mapping[str, Any]:
    """The state dict in a file: safetensors, `.npz`, `.npy`, or torch's, which is read with
    `weights_only=True`.

    Args:
        only: the model's parameter that an `.npy` file's array is for; None: there isn't exactly
            one.

    Raises:
        RecipeError: the path isn't a file, or the file can't be read or contains no state dict.
    """
    if not path.is_file():
        raise RecipeError(f"checkpoint {str(path)!r} is not a file (looked in {Path.cwd()})")
    kind = {".safetensors": "safetensors", ".npz": "numpy arrays", ".npy": "a numpy array"}.get(path.suffix, "tensors")
    try:
        loaded = _read(path)
    except Exception as error:  # on a broken file the libraries' parsers raise errors of any type
        raise RecipeError(
            f"checkpoint {str(path)!r} cannot be read as {kind}: {type(error).__name__}: {error}. "
            "Save a state dict: torch.save(model.state_dict(), path), numpy.savez(path, **arrays), or safetensors"
        ) from error
    if path.suffix == ".npy":
        if only is None:
            raise RecipeError(
                f"checkpoint {str(path)!r} contains one array without a name: save it with one, numpy.savez(path, w=array)"
            )
        return {only: loaded}
    params = unwrap(loaded)
    if not isinstance(params, Mapping):
        raise RecipeError(f"checkpoint {str(path)!r} contains a {type(params).__name__}, not a state dict")
    return params


def unwrap(loaded: Any) -> Any:
    """The state dict in a checkpoint such as `{"model": state_dict, "optimizer": ...}`."""
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _NESTED if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


def fit_names(params: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """A state dict under a model's names, if the names differ only in the prefixes of wrappers."""
    if set(params) == set(names):
        return params
    wanted = {_bare(name): name for name in names}
    found = {_bare(str(name)): value for name, value in params.items()}
    is_one_to_one = len(wanted) == len(names) and len(found) == len(params)
    if not is_one_to_one or set(found) != set(wanted):
        return params
    return {wanted[name]: value for name, value in found.items()}


def _bare(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def is_class_path(model: Mapping[str, Any]) -> bool:
    """Whether a mapping is the path of a class rather than a state dict."""
    return any(isinstance(model.get(key), str) for key in _CLASS)


def make_model(form: Mapping[str, Any], folder: Path | None) -> Any:
    """The instance that `{"class_path": "package.module.Net", "args": {...}}` describes.

    Args:
        folder: another folder to find the class in: the client script's.

    Raises:
        RecipeError: the form has unknown keys, or the class can't be imported or instantiated.
    """
    path = next(form[key] for key in _CLASS if key in form)
    arguments = form.get("args") or {}
    if unknown := sorted(map(str, form.keys() - {*_CLASS, "args"})):
        raise RecipeError(f"model has class_path and also {', '.join(unknown)}: put the class's arguments in 'args'")
    if not isinstance(arguments, Mapping):
        raise RecipeError(f"model['args'] is a {type(arguments).__name__}: give a dict of the arguments by name")
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(_import(module, folder), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"model's class_path {path!r} cannot be imported ({error}): write it as 'package.module.Class', and make it "
            "importable where you run, or put its module beside the client script"
        ) from error
    try:
        return kind(**arguments)
    except Exception as error:  # it is the user's class
        raise RecipeError(
            f"model {path}(**{dict(arguments)!r}) cannot be created here: {type(error).__name__}: {error}. The recipe needs "
            "only its initial values: give a model that can be created on the CPU, or a state dict"
        ) from error


def _import(module: str, folder: Path | None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if folder is None or error.name != module.partition(".")[0]:
            raise
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_arrays(path, "torch")
    if path.suffix in (".npy", ".npz"):
        import numpy as np

        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if path.suffix == ".npz" else loaded
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
