"""The tensors that a site keeps between rounds: a file `00003/NAME.safetensors` per name and round.

Tensors that are valid only if the update of their round counts have a file per attempt. It stays
until the site learns which of its updates counted.
"""

import os
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpool.arrays import ParamsFormat, load_arrays, save_arrays
from fedpool.client.hosts import Assignment
from fedpool.errors import ClientError
from fedpool.refusals import explained
from fedpool.tensors import is_beside

EXCLUDED = "excluded"
"""The name under which parameters are kept that aren't exchanged."""

_NONE_COUNTED = -1


def keep(assignment: Assignment, name: str, params: Mapping[str, Any]) -> None:
    """Keep tensors from this round on; see `fedpool.client.keep`."""
    _write(assignment, name, name, params)
    # A repeated round starts from the tensors that were kept before it, so the last file before
    # this round stays too.
    _remove(_before(assignment, name)[:-1])


def kept(assignment: Assignment, name: str, params_format: ParamsFormat) -> dict[str, Any] | None:
    """The tensors that were last kept in an earlier round; see `fedpool.client.kept`."""
    before = _before(assignment, name)
    return load_arrays(before[-1], params_format) if before else None


def keep_with_update(assignment: Assignment, name: str, params: Mapping[str, Any]) -> None:
    """Keep tensors that are valid only if this round's update counts."""
    _write(assignment, name, _of_attempt(name, assignment.attempt), params)
    if assignment.used is None:
        _remove(_before(assignment, name)[:-1])
        return
    counted = Path(f"{assignment.used['round']:05d}")
    found = Path(assignment.kept).glob(f"*/{name}*.safetensors") if assignment.kept else ()
    ours = [path for path in found if path.stem.partition("@")[0] == name]
    # Updates between that round and this one didn't count.
    _remove([path for path in ours if int(path.parent.name) < assignment.round and path.parent.name != counted.name])


def kept_with_update(
    assignment: Assignment, name: str, params_format: ParamsFormat
) -> tuple[dict[str, Any] | None, float]:
    """The tensors that were kept with this site's last update that counted, and the factor by which
    the server scaled that update's difference down.

    Coordinators of earlier versions don't say which update that is: then the last kept tensors.
    """
    if assignment.used is None:
        return kept(assignment, name, params_format), 1.0
    number, attempt, scale = (assignment.used[what] for what in ("round", "attempt", "scale"))
    if number == _NONE_COUNTED or assignment.kept is None:
        return None, 1.0
    folder = Path(assignment.kept) / f"{number:05d}"
    path = folder / f"{_of_attempt(name, attempt)}.safetensors"
    if not path.exists():
        # Earlier versions kept one file for all attempts, without further groups of tensors.
        if attempt and (earlier := folder / f"{name}.safetensors").exists():
            values = load_arrays(earlier, params_format)
            if not any(map(is_beside, values)):
                return values, float(scale)
        warnings.warn(
            f"the tensors that this site kept as {name!r} with its update of round {number} are gone ({path}): it starts afresh",
            stacklevel=2,
        )
        return None, 1.0
    return load_arrays(path, params_format), float(scale)


def _of_attempt(name: str, attempt: int) -> str:
    return f"{name}@{attempt}" if attempt else name  # names from scripts can't contain @


def _write(assignment: Assignment, name: str, stem: str, params: Mapping[str, Any]) -> None:
    try:
        if assignment.kept is None or assignment.silent:  # a standalone run has one round; rank 0 keeps for all ranks
            with Path(os.devnull).open("wb") as file:
                save_arrays(file, params)
            return
        target = Path(assignment.kept) / f"{assignment.round:05d}" / f"{stem}.safetensors"
        # Written to another file first, because the received values map the old one.
        partial = target.with_suffix(".partial")
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    save_arrays(file, params)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
    except (TypeError, AttributeError) as error:
        raise ClientError(f"keep({name!r}) takes a dict of name -> array: {error}") from None
    partial.replace(target)


def _before(assignment: Assignment, name: str) -> list[Path]:
    """The files that were kept under a name in earlier rounds, oldest first."""
    if assignment.kept is None:
        return []
    found = sorted(Path(assignment.kept).glob(f"*/{name}.safetensors"))
    return [path for path in found if int(path.parent.name) < assignment.round]


def _remove(paths: Collection[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # other files are kept there
            path.parent.rmdir()
