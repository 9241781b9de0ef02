"""The files that travel with a client script, found in its source without running it.

They are the script; the modules that it imports from its own folder, or from a folder that it puts
on `sys.path` relative to its `__file__`; the modules that those import; and small code and
configuration files in its own folder that it names relative to `__file__`. Naming data doesn't make
them travel: list other files in the recipe's `include`.
"""

import ast
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpool.early_settings import setting_before_import
from fedpool.errors import RecipeError
from fedpool.script_paths import ScriptPaths

NAMED_SUFFIXES = frozenset({".cfg", ".ini", ".json", ".py", ".toml", ".txt", ".yaml", ".yml"})
"""Suffixes of files that travel because the script names them: code and configuration."""
MAX_NAMED_BYTES = 64 << 10
"""Size limit of such a file: a larger one may be data."""

_SECRET = re.compile(
    r"secret|passw|credential|token(?!iz)|(?<![a-z])key|(api|auth|private|ssh)_?key|(?<![a-z])auth(?![a-z])|service.?account"
    r"|^kaggle\.json$",
    re.IGNORECASE,
)
"""Names of files that may contain secrets, and of folders that may. Such files don't travel."""

_SETTING_WORDS = (b"environ", b"putenv", b"unsetenv", b"load_dotenv")
"""A script without these words sets no environment variables, so it needn't be searched."""


@dataclass(frozen=True, slots=True)
class ScriptFiles:
    """The files that were found.

    Attributes:
        root: folder that contains all of them.
        modules: path of each code file -> its bytes.
        named: small files that the script names.
        imports: dotted names of imports from elsewhere.
        early_setting: why nothing may be imported for the script in advance; see
            `fedpool.early_settings`.
        trees: name of each code file, relative to `root` -> its parsed source.
        importable: path of each code file -> its name relative to its folder on `sys.path`.
    """

    root: Path
    modules: dict[Path, bytes]
    named: tuple[Path, ...]
    imports: frozenset[str]
    early_setting: str | None
    trees: dict[str, ast.Module]
    importable: dict[Path, str]


def find_files(script: Path, folders: Sequence[Path] = ()) -> ScriptFiles:
    """Find the files that a script or a module needs.

    Args:
        script: its path, with links resolved.
        folders: search path of its modules. The first, the module's own, takes precedence over
            installed packages. By default the script's folder.

    Raises:
        RecipeError: a module doesn't compile.
    """
    folder = folders[0] if folders else script.parent
    finder = _Finder(script, (folder, *folders[1:]))
    while not finder.find():  # a pass found another folder on sys.path
        pass
    root = Path(os.path.commonpath([path.parent for path in finder.modules]))
    named = {path for path in finder.named if path not in finder.modules and _travels(path, folder)}
    names = {path: path.relative_to(root).as_posix() for path in finder.modules}
    paths = {name: path for path, name in names.items()}

    def resolve(name: str, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, list[str]]]:
        for module in finder.imported_modules(paths[name], node):
            yield module, [names[file] for file, _ in finder.local_files(module)]

    trees = {names[path]: tree for path, tree in finder.trees.items()}
    may_set = any(word in source for source in finder.modules.values() for word in _SETTING_WORDS)
    early = setting_before_import(names[script], trees, resolve) if may_set else None
    return ScriptFiles(
        root, finder.modules, tuple(sorted(named)), frozenset(finder.imports), early, trees, finder.importable()
    )


class _Finder:
    """Reads the script and the modules that it imports, recursively."""

    def __init__(self, script: Path, folders: Sequence[Path]) -> None:
        self._script = script
        self._folder = folders[0]
        self._folders: dict[Path, bool] = {folder: folder == self._folder for folder in folders}
        """Search folders of modules, and whether they have priority over installed packages."""
        self._packages: dict[Path, tuple[str, ...]] = {}

    def find(self) -> bool:
        """Read everything; False if that revealed another folder, so it has to be repeated."""
        self.modules: dict[Path, bytes] = {}
        self.trees: dict[Path, ast.Module] = {}
        self.named: set[Path] = set()
        self.imports: set[str] = set()
        num_folders = len(self._folders)
        # Importing a module also runs the packages that contain it.
        above = self._script.relative_to(self._folder).parents
        packages = [self._folder / parent / "__init__.py" for parent in above if parent.parts]
        pending = [(file, self._folder) for file in (self._script, *packages) if file.is_file()]
        while pending:
            file, base = pending.pop()
            if file in self.modules:
                continue
            source = self.modules[file] = file.read_bytes()
            tree = self.trees[file] = _parse(os.path.relpath(file, self._script.parent), source)
            self._packages[file] = file.relative_to(base).parent.parts
            if b"__file__" in source:
                paths = ScriptPaths(file, tree)
                self.named.update(paths.existing_files())
                for folder, first in paths.search_folders():
                    self._folders.setdefault(folder, first)
            for node in ast.walk(tree):
                for module in self.imported_modules(file, node):
                    local = list(self.local_files(module))
                    pending.extend(local)
                    if not local:
                        self.imports.add(module)
        return len(self._folders) == num_folders

    def importable(self) -> dict[Path, str]:
        """Name of each code file, relative to its search folder."""
        return {
            file: "/".join((*package, file.name)) for file, package in self._packages.items() if file in self.modules
        }

    def imported_modules(self, file: Path, node: ast.AST) -> Iterator[str]:
        """Dotted names that a statement imports; `from a import b` gives `a.b`, a module or not."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = self._packages[file]
            base = node.module or ""
            if node.level:
                base = ".".join((*package[: len(package) - node.level + 1], base))
            base = base.strip(".")
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names if alias.name != "*")
            if any(alias.name == "*" for alias in node.names):
                yield base

    def local_files(self, module: str) -> Iterator[tuple[Path, Path]]:
        """The files that an import runs, with their search folders; none for installed modules."""
        for folder, first in self._folders.items():
            files = list(_module_files(folder, module))
            if files and (first or not _is_installed(module, folder)):
                yield from ((file, folder) for file in files)
                return


def _parse(name: str, source: bytes) -> ast.Module:
    try:
        tree = ast.parse(source, filename=name)
        compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{name} does not compile: {error}") from None
    return tree


def _module_files(folder: Path, module: str) -> Iterator[Path]:
    """The files in a folder that importing `module` would run; none if the folder lacks it."""
    here = folder
    for part in module.split("."):
        # Python's order: a package, a module, a folder without __init__.
        if (here / part / "__init__.py").is_file():
            here = here / part
            yield here / "__init__.py"
        elif (here / f"{part}.py").is_file():
            yield here / f"{part}.py"
            return
        elif (here / part).is_dir():
            here = here / part
        else:
            return


def _is_installed(module: str, folder: Path) -> bool:
    """Whether a module is found outside a folder."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return False
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec is not None else []
    return spec is not None and not any(Path(place).is_relative_to(folder) for place in places)


def _travels(path: Path, folder: Path) -> bool:
    """Whether a file that the script names travels: small code or configuration, no secret."""
    # A link's target counts as well as its name.
    for place in (path, path.resolve()):
        if not place.is_relative_to(folder) or place.suffix.lower() not in NAMED_SUFFIXES:
            return False
        if any(_SECRET.search(part) for part in place.relative_to(folder).parts):
            return False
    return path.stat().st_size <= MAX_NAMED_BYTES
