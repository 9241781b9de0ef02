"""User code that the coordinator runs: a recipe's class, or an aggregator function.

It travels with the job like the client script, in a zip that is named by its hash: the module, the
modules that it imports from the user's folders, and the small files that it names. Elsewhere it is
unpacked into a folder at the front of `sys.path`. Installed packages don't travel.
"""

import atexit
import hashlib
import importlib
import importlib.util
import io
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from fedpool.as_imported import check_as_imported, is_in_installed
from fedpool.bundle import MAX_BUNDLE_BYTES, unpack_bundle, zip_files
from fedpool.errors import ConfigError, IntegrityError, RecipeError
from fedpool.own_failures import OWN_FAILURES
from fedpool.refusals import explained
from fedpool.script_files import find_files

_UNPACKED = "fedpool-code-"
"""Prefix of the folders that code is unpacked into."""


@dataclass(frozen=True, slots=True)
class Code:
    """User modules ready to travel.

    Attributes:
        modules: dotted names of the modules that the job imports.
        sha256: hash of the zip.
        data: the zip's bytes.
    """

    modules: tuple[str, ...]
    sha256: str
    data: bytes = field(repr=False, compare=False)

    @property
    def files(self) -> list[str]:
        """The names of the files in it.

        Raises:
            IntegrityError: it isn't a zip.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
                return sorted(archive.namelist())
        except zipfile.BadZipFile as error:
            raise IntegrityError(f"the code is not a zip: {error}") from None


@dataclass(frozen=True, slots=True)
class Home:
    """A module's location: its file, and the folder on `sys.path` that it is found in."""

    root: Path
    file: Path


def is_installed(module: str) -> bool:
    """Whether a module is Python's, fedpool's or an installed package's; not if editable."""
    top = module.partition(".")[0]
    if top == "fedpool" or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    return any(is_in_installed(place) for place in _places(top))


def find_home(module: str) -> Home | None:
    """Location of a loaded module; None if it can't be imported by its name, like `__main__`."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" or not file:
        return None
    path = Path(file).absolute()
    tail = Path(*module.split("."))
    for end in (tail.with_name(f"{tail.name}.py"), tail / "__init__.py"):
        if path.parts[-len(end.parts) :] == end.parts and path.is_file():
            root = Path(*path.parts[: -len(end.parts)]).resolve()
            return Home(root, root / end)
    return None


def build_code(modules: Iterable[str]) -> Code:
    """The code of loaded modules, with everything that they import from the user's folders.

    Raises:
        RecipeError: a module has no file or doesn't compile, or its file has changed since it was
            imported; two files have the same name, or the whole exceeds the size limit.
    """
    names = tuple(sorted(set(modules)))
    contents: dict[str, bytes] = {}
    for module in names:
        home = find_home(module)
        if home is None:
            raise RecipeError(f"module {module!r} has no source file to import it from")
        for name, data in _files(home):
            if contents.setdefault(name, data) != data:
                raise RecipeError(
                    f"{' and '.join(names)} import two files with the same name {name}: rename one of them"
                )
    size = sum(map(len, contents.values()))
    if size > MAX_BUNDLE_BYTES:
        raise RecipeError(
            f"{' and '.join(names)} and their imports have {size / 2**20:.1f} MiB, over the limit of "
            f"{MAX_BUNDLE_BYTES >> 20} MiB"
        )
    data = zip_files(contents)
    return Code(names, hashlib.sha256(data).hexdigest(), data)


def is_loaded(code: Code) -> bool:
    """Whether this process has already imported exactly this code, from anywhere."""
    if any(module not in sys.modules for module in code.modules):
        return False
    try:
        return build_code(code.modules).sha256 == code.sha256
    except RecipeError:
        return False


def load_code(code: Code) -> None:
    """Import the modules of code that isn't loaded. Call it only if the code is allowed.

    Raises:
        IntegrityError: the code doesn't match its hash.
        ConfigError: this process has other modules of the same names, or the import fails.
    """
    with explained(tempfile.gettempdir()):
        unpacked = tempfile.TemporaryDirectory(prefix=_UNPACKED)
    folder = Path(unpacked.name).resolve()
    try:
        unpack_bundle(code.data, folder, sha256=code.sha256)
        _check_names(code, folder)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        try:
            for module in code.modules:
                _import(module, folder)
        except BaseException:
            sys.path.remove(str(folder))
            for name in [name for name, loaded in sys.modules.items() if _is_of(loaded, folder)]:
                del sys.modules[name]
            raise
    except BaseException:
        unpacked.cleanup()
        raise
    atexit.register(unpacked.cleanup)  # functions may import from it at any time


def make_room(code: Code) -> None:
    """Forget the modules of other jobs' code that has a name in common with this code.

    Objects of their classes still work, but imports inside their functions no longer do.
    """
    wanted = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in code.files}
    for place in [place for place in sys.path if Path(place).name.startswith(_UNPACKED)]:
        theirs = [name for name, loaded in list(sys.modules.items()) if _is_of(loaded, Path(place))]
        if wanted.intersection(theirs):
            sys.path.remove(place)
            for name in theirs:
                del sys.modules[name]


def _import(module: str, folder: Path) -> None:
    try:
        loaded = importlib.import_module(module)
    except OWN_FAILURES as error:
        raise ConfigError(
            f"module {module!r} of the job's code cannot be imported here: {type(error).__name__}: {error}. Install "
            "the packages that it needs here"
        ) from error
    if not _is_of(loaded, folder):
        raise _taken(module, loaded)


def _check_names(code: Code, folder: Path) -> None:
    """Refuse code that this process would mix with other modules of the same names.

    Names a module whose text differs, if there is one.
    """
    same: list[tuple[str, ModuleType]] = []
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        loaded = sys.modules.get(name)
        if loaded is None:
            continue
        home = find_home(name)
        if home is None or home.file.read_bytes() != file.read_bytes():
            raise _taken(name, loaded)
        same.append((name, loaded))
    for name, loaded in same:
        if name in code.modules:
            raise _taken(name, loaded)


def _taken(module: str, loaded: ModuleType) -> ConfigError:
    where = getattr(loaded, "__file__", None) or "Python itself"
    return ConfigError(
        f"the job's code has a module {module!r}, but this process has another module of that name ({where}): use a process "
        "that has not imported it, such as the fedpool command, or rename the module"
    )


def _is_of(module: ModuleType, folder: Path) -> bool:
    known = getattr(module, "__dict__", {})  # without a module's computed attributes
    places = [known.get("__file__") or "", *known.get("__path__", ())]
    return any(place and Path(place).is_relative_to(folder) for place in places)


def _files(home: Home) -> Iterator[tuple[str, bytes]]:
    """A module's files from the user's folders: names as they are imported, and contents."""
    folders = [home.root]
    while True:
        found = find_files(home.file, folders)
        more = {root for name in found.imports for root in _roots(name.partition(".")[0])} - set(folders)
        if not more:
            break
        folders += sorted(more)
    for file, name in found.importable.items():
        check_as_imported(file, found.modules[file])
        yield name, found.modules[file]
    for file in found.named:
        yield file.relative_to(home.root).as_posix(), file.read_bytes()


def _roots(top: str) -> Iterator[Path]:
    """The user's folders that contain a top-level module; none if it is installed or missing."""
    if not is_installed(top):
        for place in _places(top):
            yield place.parent


def _places(top: str) -> Iterator[Path]:
    """The files and folders that a top-level module is, or would be, loaded from."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # `__main__` has none
        return
    if spec is None:
        return
    if spec.submodule_search_locations is not None:
        yield from (Path(place).absolute() for place in spec.submodule_search_locations)
    elif spec.origin and spec.has_location:
        yield Path(spec.origin).absolute()
