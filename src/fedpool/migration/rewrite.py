"""Change the imports of a script from NVFlare to fedpool, and no other byte.

Imports that can't be changed safely stay, and `remarks` names them.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fedpool.errors import MigrationError
from fedpool.migration.names import MODULES, NAMES
from fedpool.migration.source import Source, Span

Edit = tuple[Span, str]

_GAP = rb"(?:\s|\\)*"  # a backslash may continue the line
_NAME = re.compile(rb"\w+(?:" + _GAP + rb"\." + _GAP + rb"\w+)*")
_FROM = re.compile(rb"from" + _GAP + rb"(" + _NAME.pattern + rb")" + _GAP + rb"import")


@dataclass(frozen=True, slots=True)
class _Moved:
    """An imported name and its place in fedpool; `module` is None if fedpool doesn't have it."""

    bound: str
    module: str | None
    name: str

    @property
    def text(self) -> str:
        """The name as an import statement has it."""
        return self.name if self.bound == self.name else f"{self.name} as {self.bound}"


def rewrite(source: Source) -> Source:
    """The source with its imports changed; the same source if there is nothing to change.

    Raises:
        MigrationError: it isn't Python.
    """
    edits: list[Edit] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_theirs(node.module):
            edits += _of_import_from(source, node)
        elif isinstance(node, ast.Import):
            edits += [
                (_dotted(source, name), MODULES[name.name])
                for name in node.names
                if name.asname and name.name in MODULES
            ]
    edits += _of_plain_imports(source)
    if not edits:
        return source
    result = source.edited(edits)
    try:
        ast.parse(result.text)
    except SyntaxError as error:  # never seen, but no change is better than a broken script
        raise MigrationError(
            f"{source.name} was left as it is, because its imports cannot be changed: {error}"
        ) from None
    return result


def _is_theirs(module: str | None) -> bool:
    return module is not None and (module == "nvflare" or module.startswith("nvflare."))


def _of_import_from(source: Source, node: ast.ImportFrom) -> list[Edit]:
    module = node.module
    assert module is not None
    if node.names[0].name == "*":
        return [(_module_span(source, node), MODULES[module])] if module in MODULES and module in NAMES else []
    moved = [_moved(module, alias) for alias in node.names]
    targets = list(dict.fromkeys(each.module for each in moved))
    if targets == [None]:
        return []
    if len(targets) == 1:
        assert targets[0] is not None
        renamed = [
            (_dotted(source, alias), each.name if alias.asname else each.text)
            for alias, each in zip(node.names, moved, strict=True)
            if alias.name != each.name
        ]
        return [(_module_span(source, node), targets[0]), *renamed]
    span = source.span(node)
    if b"#" in source.data[span[0] : span[1]]:  # only a person knows which names the comments are about
        return []
    before, after = source.around(span)
    alone = not before.strip() and (not after.strip() or after.lstrip().startswith("#"))
    statements = [
        f"from {target or module} import {', '.join(each.text for each in moved if each.module == target)}"
        for target in targets
    ]
    return [(span, (source.newline + before if alone else "; ").join(statements))]


def _moved(module: str, alias: ast.alias) -> _Moved:
    bound = alias.asname or alias.name
    if (whole := MODULES.get(f"{module}.{alias.name}")) is not None:
        package, _, name = whole.rpartition(".")
        return _Moved(bound, package, name)
    target, name = NAMES.get(module, {}).get(alias.name, (None, alias.name))
    return _Moved(bound, target, name)


def _module_span(source: Source, node: ast.ImportFrom) -> Span:
    """The span of the module's name, between `from` and `import`."""
    start, end = source.span(node)
    match = _FROM.match(source.data, start, end)
    assert match is not None, "an import statement has this form"
    return match.span(1)


def _dotted(source: Source, alias: ast.alias) -> Span:
    """The span of an imported name, without its `as` name."""
    match = _NAME.match(source.data, *source.span(alias))
    assert match is not None, "an import names something"
    return match.span()


def _of_plain_imports(source: Source) -> list[Edit]:
    """The edits of `import nvflare.client` and all its uses; none if any use is unclear."""
    plain = [
        (node, alias)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname is None and _is_theirs(alias.name)
    ]
    if not plain or not _names_free(source.tree) or any(alias.name not in MODULES for _, alias in plain):
        return []
    edits = [(source.span(alias), MODULES[alias.name]) for _, alias in plain]
    for chain in chains(source.tree, "nvflare"):
        found = resolve(chain)
        if found is None:
            return []
        node, text = found
        edits.append((source.span(node), text))
    return edits


def _names_free(tree: ast.Module) -> bool:
    """Whether `nvflare` is only the package in this file, and `fedpool` unused or the package."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id="nvflare" | "fedpool", ctx=ast.Store() | ast.Del()):
                return False
            case ast.arg(arg="nvflare" | "fedpool"):
                return False
            case ast.FunctionDef(name="nvflare" | "fedpool") | ast.ClassDef(name="nvflare" | "fedpool"):
                return False
            case ast.alias(asname="nvflare" | "fedpool"):
                return False
    return True


def chains(tree: ast.Module, root: str) -> Iterator[list[ast.expr]]:
    """Each use of a name with the attributes that follow it: the nodes of `a`, `a.b`, `a.b.c`."""
    outer = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == root and isinstance(node.ctx, ast.Load):
            chain: list[ast.expr] = [node]
            while id(chain[-1]) in outer:
                chain.append(outer[id(chain[-1])])
            yield chain


def resolve(chain: list[ast.expr]) -> tuple[ast.expr, str] | None:
    """The part of a chain that is an NVFlare name with a counterpart, and the counterpart."""
    words = [node.attr if isinstance(node, ast.Attribute) else "nvflare" for node in chain]
    for length in range(len(words) - 1, 0, -1):
        names = NAMES.get(".".join(words[:length]), {})
        if words[length] in names:
            module, name = names[words[length]]
            return chain[length], f"{module}.{name}"
    return None
