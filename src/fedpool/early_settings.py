"""Whether a script sets environment variables before an import, which then can't be done early.

Many libraries read their variables when they are imported (`HF_HOME`, `KERAS_BACKEND`). A script
forked from a process that has already imported them would set these variables too late. The source
is read in the order in which it would run: a module's statements in sequence, and a module of the
bundle at its first import. A function's settings count at the point where module code calls it by
name. Imports inside functions count last.
"""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_READ_WHEN_USED = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_VISIBLE_DEVICES",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PYTHONHASHSEED",
        "RANK",
        "TOKENIZERS_PARALLELISM",
        "WORLD_SIZE",
    }
)
"""Variables that scripts often set, but that no import reads, or that are read only later."""

_SETTERS = frozenset({"__setitem__", "clear", "pop", "popitem", "setdefault", "update"})
_ENVIRONS = ("environ", "environb")
_FUNCTIONS_THAT_SET = ("putenv", "unsetenv", "load_dotenv")
Aliases = Mapping[str, str]
"""Name in a file -> its meaning: a name from `_ENVIRONS` or `_FUNCTIONS_THAT_SET`."""
Resolve = Callable[[str, ast.Import | ast.ImportFrom], Iterable[tuple[str, Sequence[str]]]]

_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True, slots=True)
class _Setting:
    what: str
    where: str


@dataclass(frozen=True, slots=True)
class _Import:
    module: str
    where: str


def setting_before_import(entry: str, trees: Mapping[str, ast.Module], resolve: Resolve) -> str | None:
    """Why a script's imports can't be done in advance, in words; None if they can.

    Args:
        entry: name of the script's file.
        trees: file -> its parsed source, for the script and the modules of its bundle.
        resolve: maps an import statement in a file to the dotted names that it imports, each with
            the files of the bundle that this runs (none for installed modules).
    """
    reader = _Reader(trees, resolve)
    imported: set[str] = set()
    settings: list[_Setting] = []
    for event in [*reader.module(entry), *reader.in_functions()]:
        if isinstance(event, _Setting):
            settings.append(event)
        elif event.module not in imported:
            imported.add(event.module)
            if settings and not _is_ours(event.module):
                first = settings[0]
                return f"{first.where} sets {first.what}, and {event.where} imports {event.module} after that"
    return None


class _Reader:
    """Reads modules in the order in which they would run."""

    def __init__(self, trees: Mapping[str, ast.Module], resolve: Resolve) -> None:
        self._trees = trees
        self._resolve = resolve
        self._read: set[str] = set()
        self._inside: list[tuple[str, ast.AST]] = []  # files and their functions
        self._aliases = self._find_aliases()
        self._setting_functions = self._find_setting_functions()

    def module(self, name: str) -> Iterator[_Setting | _Import]:
        """The effects of a bundle module's first import."""
        if name not in self._read and name in self._trees:
            self._read.add(name)
            yield from self._statements(name, self._trees[name])

    def in_functions(self) -> Iterator[_Setting | _Import]:
        """The possible effects of functions in the modules read so far, settings first."""
        for name, function in self._inside:
            for node in ast.walk(function):
                yield from self._settings(name, node)
        for name, function in self._inside:
            for node in ast.walk(function):
                yield from self._imports(name, node)

    def _statements(self, name: str, parent: ast.AST) -> Iterator[_Setting | _Import]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, _FUNCTIONS):
                self._inside.append((name, node))
                continue
            yield from self._settings(name, node)
            yield from self._imports(name, node)
            if isinstance(node, ast.Call) and _called(node) in self._setting_functions:
                yield _Setting(f"environment variables in {_called(node)}()", f"{name} line {node.lineno}")
            yield from self._statements(name, node)

    def _imports(self, name: str, node: ast.AST) -> Iterator[_Setting | _Import]:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            return
        for module, files in self._resolve(name, node):
            for file in files:
                yield from self.module(file)
            if not files:
                source = node.module if isinstance(node, ast.ImportFrom) and node.module and not node.level else module
                yield _Import(source, f"{name} line {node.lineno}")

    def _settings(self, name: str, node: ast.AST) -> Iterator[_Setting]:
        return _settings(name, node, self._aliases[name])

    def _find_aliases(self) -> dict[str, dict[str, str]]:
        """Each file's aliases of the environment and its setters, by assignment or import."""
        found: dict[str, dict[str, str]] = {name: {} for name in self._trees}
        nodes = [
            (name, node)
            for name, tree in self._trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.NamedExpr)
        ]
        while True:
            count = sum(map(len, found.values()))
            for name, node in nodes:
                if isinstance(node, ast.ImportFrom):
                    found[name].update(self._imported_aliases(name, node, found))
                elif node.value is not None and _is_environ(node.value, found[name]):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found[name].update((target.id, "environ") for target in targets if isinstance(target, ast.Name))
            if count == sum(map(len, found.values())):
                return found

    def _imported_aliases(
        self, name: str, node: ast.ImportFrom, found: Mapping[str, Aliases]
    ) -> Iterator[tuple[str, str]]:
        files = [file for _, files in self._resolve(name, node) for file in files]
        for alias in node.names:
            if node.module in ("os", "posix", "dotenv") and alias.name in (*_ENVIRONS, *_FUNCTIONS_THAT_SET):
                yield alias.asname or alias.name, alias.name
            for file in files:
                known = found.get(file, {})
                if alias.name == "*":
                    yield from known.items()
                elif alias.name in known:
                    yield alias.asname or alias.name, known[alias.name]

    def _find_setting_functions(self) -> set[str]:
        """Names of functions that set variables, or call such a function."""
        functions = [
            (name, node)
            for name, tree in self._trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        renamed = [
            (alias.name, alias.asname)
            for tree in self._trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.asname
        ]
        found: set[str] = set()
        while True:
            more = {
                function.name
                for name, function in functions
                if function.name not in found
                and any(
                    next(self._settings(name, node), None) is not None
                    or (isinstance(node, ast.Call) and _called(node) in found)
                    for node in ast.walk(function)
                )
            }
            more |= {new for old, new in renamed if old in found | more and new not in found}
            if not more:
                return found
            found |= more


def _settings(name: str, node: ast.AST, aliases: Aliases) -> Iterator[_Setting]:
    """The variables that a node itself sets, in a file with these aliases."""
    targets: Sequence[ast.AST] = ()
    keys: Sequence[ast.AST | None] = ()
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call):
        function = node.func
        first = node.args[0] if node.args else None
        called = aliases.get(function.id, function.id) if isinstance(function, ast.Name) else _called(node)
        if isinstance(function, ast.Attribute) and _is_environ(function.value, aliases) and function.attr in _SETTERS:
            many = function.attr == "update"
            keys = [*_keys(first), *(ast.Constant(keyword.arg) for keyword in node.keywords)] if many else [first]
        elif called in _FUNCTIONS_THAT_SET:
            keys = [None if called == "load_dotenv" else first]
    for target in targets:
        if isinstance(target, ast.Subscript) and _is_environ(target.value, aliases):
            keys = [*keys, target.slice]
        elif _is_environ(target, aliases) and (isinstance(node, ast.AugAssign) or isinstance(target, ast.Attribute)):
            # Assigning another value to a name of the environment doesn't change the environment.
            keys = [*keys, *_keys(getattr(node, "value", None))]
    for key in keys:
        known = key.value if isinstance(key, ast.Constant) else None
        if known not in _READ_WHEN_USED:
            what = f"os.environ[{known!r}]" if isinstance(known, str) else "environment variables"
            yield _Setting(what, f"{name} line {getattr(node, 'lineno', 0)}")


def _keys(values: ast.AST | None) -> list[ast.AST | None]:
    """The keys of a dict literal; for any other expression a single unknown key."""
    return list(values.keys) if isinstance(values, ast.Dict) else [None] if values is not None else []


def _is_environ(node: ast.AST, aliases: Aliases) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr in _ENVIRONS) or (
        isinstance(node, ast.Name) and aliases.get(node.id, node.id) in _ENVIRONS
    )


def _called(call: ast.Call) -> str:
    """The last name of the called function."""
    function = call.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def _is_ours(module: str) -> bool:
    """Whether a module is Python's or fedpool's, so its import reads no variable of a script."""
    root = module.partition(".")[0]
    return root in sys.stdlib_module_names or root == "fedpool"
