"""Paths that a script's source names relative to its own location, computed without running it.

Supported are literals, `__file__`, names that are assigned once, `/`, `+`, f-strings, and the usual
functions of `os.path` and `pathlib`. Expressions that depend on anything else have no value here.
"""

import ast
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_Value = str | Path

_PURE = {
    "dirname": os.path.dirname,
    "abspath": os.path.abspath,
    "realpath": os.path.realpath,
    "normpath": os.path.normpath,
    "str": str,
    "fspath": os.fspath,
}
_SAME = frozenset({"resolve", "absolute", "as_posix", "expanduser"})


class ScriptPaths:
    """The paths in a module that are built on its `__file__`.

    Args:
        file: the module's path.
        tree: its parsed source.
    """

    def __init__(self, file: Path, tree: ast.Module) -> None:
        self._file = file
        self._tree = tree
        self._names = _assigned_once(tree)
        self._values: dict[str, tuple[_Value, bool] | None] = {}

    def existing_files(self) -> Iterator[Path]:
        """Files that the module's expressions name. Links are not followed."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.expr) and (path := self._path(node)) is not None and path.is_file():
                yield path

    def search_folders(self) -> Iterator[tuple[Path, bool]]:
        """Absolute paths of folders added to `sys.path`, and whether they go in front."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_sys_path(node.func.value):
                added = node.args[-1:] if node.func.attr in ("insert", "append") else []
                first = node.func.attr == "insert"
            elif isinstance(node, ast.AugAssign) and _is_sys_path(node.target) and isinstance(node.value, ast.List):
                added, first = node.value.elts, False
            else:
                continue
            for expression in added:
                if (path := self._path(expression)) is not None and path.is_dir():
                    yield path.resolve(), first

    def _path(self, node: ast.expr) -> Path | None:
        """An expression's normalised path, if it is built on `__file__` and exists."""
        found = self._value(node)
        if found is None or not found[1] or "\0" in str(found[0]):
            return None
        path = Path(os.path.normpath(found[0]))
        try:
            path.stat()
        except OSError:  # the path doesn't exist, or is too long
            return None
        return path

    def _value(self, node: ast.expr) -> tuple[_Value, bool] | None:
        """An expression's value, and whether it is built on `__file__`; None if it isn't known."""
        try:
            return self._evaluate(node)
        except (TypeError, ValueError, IndexError, RecursionError):
            return None

    def _evaluate(self, node: ast.expr) -> tuple[_Value, bool] | None:
        match node:
            case ast.Constant(value=str() as text):
                return text, False
            case ast.Name(id="__file__"):
                return str(self._file), True
            case ast.Name(id=name) if name in self._names:
                if name not in self._values:
                    self._values[name] = None  # in case its definition refers to itself
                    self._values[name] = self._value(self._names[name])
                return self._values[name]
            case ast.JoinedStr(values=parts):
                inner = [part.value if isinstance(part, ast.FormattedValue) else part for part in parts]
                return self._combine(inner, lambda *values: "".join(map(str, values)))
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return self._combine([left, right], lambda a, b: Path(a) / b)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._combine([left, right], lambda a, b: a + b)
            case ast.Attribute(value=value, attr="parent"):
                return self._combine([value], lambda a: a.parent)
            case ast.Subscript(
                value=ast.Attribute(value=value, attr="parents"), slice=ast.Constant(value=int() as number)
            ):
                return self._combine([value], lambda a: a.parents[number])
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in _SAME:
                return self._value(value)
            case ast.Call(func=ast.Attribute(value=value, attr="joinpath" | "with_name" as name), args=arguments):
                return self._combine([value, *arguments], lambda a, *rest: getattr(Path(a), name)(*rest))
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments, keywords=[]):
                return self._called(name, arguments)
        return None

    def _called(self, name: str, arguments: list[ast.expr]) -> tuple[_Value, bool] | None:
        if name in ("Path", "PurePath"):
            return self._combine(arguments, Path)
        if name == "join":
            return self._combine(arguments, os.path.join)
        if name in _PURE and len(arguments) == 1:
            return self._combine(arguments, _PURE[name])
        return None

    def _combine(self, nodes: list[ast.expr], function: "object") -> tuple[_Value, bool] | None:
        found = [self._value(node) for node in nodes]
        known = [value for value in found if value is not None]
        if len(known) < len(found) or not callable(function):
            return None
        value = function(*(value for value, _ in known))
        return (value, any(own for _, own in known)) if isinstance(value, str | Path) else None


def _assigned_once(tree: ast.Module) -> Mapping[str, ast.expr]:
    """Names that are assigned one value in the whole module, with the expression."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found.setdefault(node.target.id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def _is_sys_path(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "path"
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    )
