"""Code of the user's that the coordinator runs: the class of a recipe, the function of an
aggregator.

It travels with the job as the client script does: the module, the modules that it imports from the
user's folders, and the small files that it names, in a zip whose name is its hash. Elsewhere it is
unpacked into a folder that comes first on `sys.path`. What is installed does not travel.
"""

import atexit
import hashlib
import importlib
import importlib.util
import io
import site
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

from fedpool.bundle import MAX_BUNDLE_BYTES, unpack_bundle, zip_files
from fedpool.errors import ConfigError, IntegrityError, RecipeError
from fedpool.refusals import explained
from fedpool.script_files import find_files

_UNPACKED = "fedpool-code-"
"""How the folders of code begin that is unpacked here."""
_INSTALLED = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True)
class Code:
    """Modules of the user's, ready to travel.

    Attributes:
        modules: dotted names of those that the job imports.
        sha256: of the zip.
        data: the zip's bytes.
    """

    modules: tuple[str, ...]
    sha256: str
    data: bytes = field(repr=False, compare=False)

    @property
    def files(self) -> list[str]:
        """The names of the files in it.

        Raises:
            IntegrityError: it is not a zip.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
                return sorted(archive.namelist())
        except zipfile.BadZipFile as error:
            raise IntegrityError(f"the code is not a zip: {error}") from None


@dataclass(frozen=True, slots=True)
class Home:
    """Where a module lies: its file, and the folder on `sys.path` that it is found from."""

    root: Path
    file: Path


def is_installed(module: str) -> bool:
    """Whether a module is Python's, fedpool's, or of a package that is installed; not one of an
    editable installation.
    """
    top = module.partition(".")[0]
    if top == "fedpool" or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    return any(_is_in_installed(place) for place in _places(top))


def find_home(module: str) -> Home | None:
    """Where a module that is loaded lies; None when it cannot be imported by its name from a
    file, as one that is run.
    """
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
    """The code of modules that are loaded, with all that they import from the user's folders.

    Raises:
        RecipeError: a module has no file or does not compile, two files have one name, or the whole
            exceeds the size limit.
    """
    names = tuple(sorted(set(modules)))
    contents: dict[str, bytes] = {}
    for module in names:
        home = find_home(module)
        if home is None:
            raise RecipeError(f"module {module!r} has no source file that it can be imported from")
        for name, data in _files(home):
            if contents.setdefault(name, data) != data:
                raise RecipeError(
                    f"{' and '.join(names)} import two files that are both called {name}: rename one of them"
                )
    size = sum(map(len, contents.values()))
    if size > MAX_BUNDLE_BYTES:
        raise RecipeError(
            f"{' and '.join(names)} and what they import hold {size / 2**20:.1f} MiB, over the limit of "
            f"{MAX_BUNDLE_BYTES >> 20} MiB"
        )
    data = zip_files(contents)
    return Code(names, hashlib.sha256(data).hexdigest(), data)


def is_loaded(code: Code) -> bool:
    """Whether this process has imported that very code, from wherever."""
    if any(module not in sys.modules for module in code.modules):
        return False
    try:
        return build_code(code.modules).sha256 == code.sha256
    except RecipeError:
        return False


def load_code(code: Code) -> None:
    """Import the modules of code that is not loaded. Run it only where that is allowed.

    Raises:
        IntegrityError: it is not what its hash says.
        ConfigError: this process has other modules of those names, or the import fails.
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
    atexit.register(unpacked.cleanup)  # functions may import from it as long as the process lives


def make_room(code: Code) -> None:
    """Forget the modules of other jobs' code that has one of the same names; objects of their
    classes go on as they are.

    What a function of theirs imports only when it is called is not found any more.
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
    except Exception as error:  # it is the user's code
        raise ConfigError(
            f"module {module!r} of the job's code cannot be imported here: {type(error).__name__}: {error}. What it needs "
            "beside its own folder has to be installed here"
        ) from error
    if not _is_of(loaded, folder):
        raise _taken(module, loaded)


def _check_names(code: Code, folder: Path) -> None:
    """Refuse code that this process would mix with other modules of the same names."""
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        loaded = sys.modules.get(name)
        if loaded is None:
            continue
        home = find_home(name)
        if name in code.modules or home is None or home.file.read_bytes() != file.read_bytes():
            raise _taken(name, loaded)


def _taken(module: str, loaded: ModuleType) -> ConfigError:
    where = getattr(loaded, "__file__", None) or "Python itself"
    return ConfigError(
        f"the job's code has a module {module!r}, and this process has another one of that name ({where}): use a process that "
        "has not imported that, such as the fedpool command, or rename the module"
    )


def _is_of(module: ModuleType, folder: Path) -> bool:
    known = getattr(module, "__dict__", {})  # and nothing that a module makes up when it is asked
    places = [known.get("__file__") or "", *known.get("__path__", ())]
    return any(place and Path(place).is_relative_to(folder) for place in places)


def _files(home: Home) -> Iterator[tuple[str, bytes]]:
    """What a module needs from the user's folders: names as it imports them, and contents."""
    folders = [home.root]
    while True:
        found = find_files(home.file, folders)
        more = {root for name in found.imports for root in _roots(name.partition(".")[0])} - set(folders)
        if not more:
            break
        folders += sorted(more)
    for file, name in found.importable.items():
        yield name, found.modules[file]
    for file in found.named:
        yield file.relative_to(home.root).as_posix(), file.read_bytes()


def _roots(top: str) -> Iterator[Path]:
    """The user's folders that a module or a package is found from; none when it is installed, or
    not there.
    """
    if not is_installed(top):
        for place in _places(top):
            yield place.parent


def _places(top: str) -> Iterator[Path]:
    """The files and folders that a top-level module would be, or was, loaded from."""
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


def _is_in_installed(place: Path) -> bool:
    return not _INSTALLED.isdisjoint(place.parts) or any(
        place.is_relative_to(folder) for folder in _installed_folders()
    )


@cache
def _installed_folders() -> frozenset[Path]:
    """Where Python and packages are installed."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return frozenset(Path(folder).resolve() for folder in folders)
