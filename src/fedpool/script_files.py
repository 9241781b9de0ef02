"""The files that a client script needs and that travel with it: found in its source, without
running it.

They are the script; the modules that it imports from its own folder, or from a folder that it puts
on `sys.path` relative to its `__file__`, and what those import; and small files of code and
configuration in its own folder that it names relative to `__file__`. Data never travel by being
named: whatever else a script needs is to be named in the recipe, by `include`.
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
"""Of files that travel because the script names them: code and configuration."""
MAX_NAMED_BYTES = 64 << 10
"""Size of such a file: a larger one may be data."""

_SECRET = re.compile(
    r"secret|passw|credential|token(?!iz)|(?<![a-z])key|(api|auth|private|ssh)_?key|(?<![a-z])auth(?![a-z])|service.?account"
    r"|^kaggle\.json$",
    re.IGNORECASE,
)
"""Names of files, and of folders above them, that may hold one; such files do not travel either."""

_SETTING_WORDS = (b"environ", b"putenv", b"unsetenv", b"load_dotenv")
"""Without any of them a script sets no environment variable, and need not be looked through for
it.
"""


@dataclass(frozen=True, slots=True)
class ScriptFiles:
    """What was found.

    Attributes:
        root: folder that holds all of it.
        modules: path of each file of code -> its bytes.
        named: small files that the script names.
        imports: dotted names of what is imported from elsewhere.
        early_setting: why nothing must be imported for the script beforehand; see
            `fedpool.early_settings`.
        trees: name of each file of code, relative to `root` -> its source, parsed.
        importable: path of each file of code -> its name relative to the folder on `sys.path` that
            it is found from.
    """

    root: Path
    modules: dict[Path, bytes]
    named: tuple[Path, ...]
    imports: frozenset[str]
    early_setting: str | None
    trees: dict[str, ast.Module]
    importable: dict[Path, str]


def find_files(script: Path, folders: Sequence[Path] = ()) -> ScriptFiles:
    """Find what a script, or a module, needs.

    Args:
        script: its path, links followed.
        folders: that its modules are found in, the first before what is installed: that is the
            module's; none: its own folder.

    Raises:
        RecipeError: a module does not compile.
    """
    folder = folders[0] if folders else script.parent
    finder = _Finder(script, (folder, *folders[1:]))
    while not finder.find():  # a folder on sys.path was found after modules had been looked for
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
        """The folders that modules are found in, and whether before what is installed."""
        self._packages: dict[Path, tuple[str, ...]] = {}

    def find(self) -> bool:
        """Read everything; False when that has shown another folder to look in, so that it has
        to be done again.
        """
        self.modules: dict[Path, bytes] = {}
        self.trees: dict[Path, ast.Module] = {}
        self.named: set[Path] = set()
        self.imports: set[str] = set()
        num_folders = len(self._folders)
        # Importing a module of a package runs the packages that it is in, too.
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
        """Name of each file of code, relative to the folder that it is found from."""
        return {
            file: "/".join((*package, file.name)) for file, package in self._packages.items() if file in self.modules
        }

    def imported_modules(self, file: Path, node: ast.AST) -> Iterator[str]:
        """Dotted names of what a statement imports; `from a import b` gives `a.b`, which may be
        a module or not.
        """
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
        """The files that importing a module would run, with the folder that they are found from;
        none when it is installed.
        """
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
    """The files of a folder that importing `module` would run; none when it is not a module of
    the folder.
    """
    here = folder
    for part in module.split("."):
        # In Python's order: a package, a module, a folder without __init__.
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
    """Whether a module is found elsewhere than in a folder."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return False
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec is not None else []
    return spec is not None and not any(Path(place).is_relative_to(folder) for place in places)


def _travels(path: Path, folder: Path) -> bool:
    """Whether a file that the script names goes with it: code or configuration in its folder,
    small, and not a secret.
    """
    # Where a link leads counts as well as what it is called.
    for place in (path, path.resolve()):
        if not place.is_relative_to(folder) or place.suffix.lower() not in NAMED_SUFFIXES:
            return False
        if any(_SECRET.search(part) for part in place.relative_to(folder).parts):
            return False
    return path.stat().st_size <= MAX_NAMED_BYTES
