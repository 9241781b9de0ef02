"""Whether the user's modules are still what this process imported.

A job takes the text of a module from its file, but runs the code that was imported. If the file was
edited in between, as happens in a notebook, the two differ, and nobody could verify the job. So the
text of each loaded module is noted whenever a recipe, a filter or an aggregator is defined or
named: at that moment its module and most of what it uses have just been imported.
"""

import hashlib
import importlib.machinery
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from fedpool.errors import RecipeError

_INSTALLED = frozenset({"site-packages", "dist-packages"})
_NOTED: "WeakKeyDictionary[ModuleType, tuple[object, str | None]]" = WeakKeyDictionary()
"""Module -> its spec, which is new if the module is reloaded, and its text's hash; None: not the
user's.
"""


def note_imports(module: str) -> None:
    """Note the text of all loaded modules of the user's, because `module` defines something.

    Does nothing if that is one of fedpool's own modules.
    """
    if module.partition(".")[0] != "fedpool":
        for _ in _noted():
            pass


def check_as_imported(file: Path, data: bytes) -> None:
    """Refuse a module's file that has changed since this process imported it.

    Args:
        data: the file's contents.

    Raises:
        RecipeError: it has changed.
    """
    noted = {Path(path).resolve(): sha256 for path, sha256 in _noted()}
    if noted.get(file.resolve()) not in (None, hashlib.sha256(data).hexdigest()):
        raise _changed(str(file))


def check_function(function: Callable[..., Any]) -> None:
    """Refuse a function that its module's file no longer contains as it was imported.

    Nothing of fedpool may have run when the module was imported, so its text may not be noted.

    Raises:
        RecipeError: it doesn't contain it.
    """
    code = getattr(function, "__code__", None)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if not isinstance(code, CodeType) or module is None:
        return
    file = _users_file(module)
    # Other loaders compile something else than the text: pytest's and type checkers' do.
    plain = type(_known(module).get("__loader__")) is importlib.machinery.SourceFileLoader
    if file is None or not plain or code.co_filename != file:
        return
    try:
        there = compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError):
        raise _changed(file) from None
    if code not in _codes(there):
        raise _changed(file)


def is_in_installed(place: Path) -> bool:
    """Whether a file or folder belongs to Python or to an installed package."""
    return not _INSTALLED.isdisjoint(place.parts) or any(
        place.is_relative_to(folder) for folder in _installed_folders()
    )


def _changed(file: str) -> RecipeError:
    return RecipeError(
        f"{file} has changed since this process imported it, so the job would be stored with other code than it runs: "
        "restart Python (in a notebook: the kernel) or reload the module, and build the recipe again"
    )


def _noted() -> Iterator[tuple[str, str]]:
    """The file and the hash of every loaded module of the user's, noted now if they were not."""
    for module in list(sys.modules.values()):
        # cffi's libraries say that they are modules, and have no attributes of one.
        if not issubclass(type(module), ModuleType) or (file := _users_file(module)) is None:
            continue
        spec = _known(module).get("__spec__")
        before = _NOTED.get(module)
        if before is None or before[0] is not spec:
            before = _NOTED[module] = spec, _hash_of(file)
        if before[1] is not None:
            yield file, before[1]


def _hash_of(file: str) -> str | None:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None


def _users_file(module: ModuleType) -> str | None:
    """The file of a module of the user's; None if it has none, or belongs to someone else."""
    file = _known(module).get("__file__")
    return file if isinstance(file, str) and is_users(file) else None


@cache
def is_users(file: str) -> bool:
    """Whether a file is a module that is neither fedpool's nor installed."""
    path = Path(file)
    if path.suffix != ".py" or is_in_installed(path):
        return False
    ours = Path(__file__).parent
    return not path.is_relative_to(ours) and not path.resolve().is_relative_to(ours.resolve())


def _known(module: ModuleType) -> dict[str, Any]:
    """A module's attributes, without those that it computes, and without loading a lazy module."""
    known: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return known


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


@cache
def _installed_folders() -> frozenset[Path]:
    """The folders that Python and packages are installed in."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return frozenset(Path(folder).resolve() for folder in folders)
