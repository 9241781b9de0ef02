"""What is left to do by hand in a script that was written for NVFlare, line by line."""

import ast
import re
from dataclasses import dataclass

from fedpool.migration.names import EXPORTS, MODULES, NAMES, advice
from fedpool.migration.rewrite import chains
from fedpool.migration.source import Source

_DOTTED = re.compile(r"nvflare(\.\w+)+")


@dataclass(frozen=True, slots=True, order=True)
class Remark:
    """A place that a person has to look at.

    Attributes:
        line: its line number, from 1.
        subject: the code in question.
        advice: what to do.
    """

    line: int
    subject: str
    advice: str


def remarks(source: Source) -> list[Remark]:
    """The remarks about a source whose imports have been changed, in line order."""
    found: set[Remark] = set()
    aliases: dict[str, str] = {}
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    found |= _of_import(node.lineno, alias)
                    if alias.asname:
                        aliases[alias.asname] = alias.name
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found |= {remark for alias in names for remark in _of_import_from(alias, module, node.lineno)}
                aliases |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
            case ast.Constant(value=str(text)) if _DOTTED.fullmatch(text):
                found.add(Remark(node.lineno, repr(text), f"a string that names an NVFlare module: {advice(text)}"))
            case ast.Call(func=ast.Name(id="init") | ast.Attribute(attr="init"), keywords=keywords):
                for keyword in keywords:
                    if keyword.arg == "config_file":
                        text = "is ignored with a warning: leave it out, and configure the recipe and the site"
                        found.add(Remark(keyword.value.lineno, "init(config_file=)", text))
    for bound, module in aliases.items():
        found |= _of_uses(source.tree, bound, module)
    if any(isinstance(node, ast.Import) and _binds_nvflare(node) for node in ast.walk(source.tree)):
        for chain in chains(source.tree, "nvflare"):
            text = ast.unparse(chain[-1])
            found.add(Remark(chain[0].lineno, text, advice(text)))
    return sorted(found)


def _binds_nvflare(node: ast.Import) -> bool:
    return any(alias.asname is None and alias.name.split(".")[0] == "nvflare" for alias in node.names)


def _of_import(line: int, alias: ast.alias) -> set[Remark]:
    if alias.name.split(".")[0] != "nvflare":
        return set()
    known = alias.name in MODULES
    text = "unchanged, because its uses are unclear: import it with `as`" if known else advice(alias.name)
    return {Remark(line, f"import {alias.name}", text)}


def _of_import_from(alias: ast.alias, module: str, line: int) -> set[Remark]:
    if module.split(".")[0] == "nvflare":
        name = f"{module}.{alias.name}"
        known = alias.name in NAMES.get(module, {})
        text = "unchanged, because the statement contains comments: import it separately" if known else advice(name)
        return {Remark(alias.lineno or line, name, text)}
    if module in EXPORTS and alias.name == "*":
        return {
            Remark(line, f"from {module} import *", "import the names that you use instead: some may be missing here")
        }
    return set()


def _of_uses(tree: ast.Module, bound: str, module: str) -> set[Remark]:
    """Uses of attributes that the fedpool module doesn't have."""
    if module not in EXPORTS:
        return set()
    found = set()
    inside = {name.removeprefix(f"{module}.") for name in EXPORTS if name.startswith(f"{module}.")}
    for chain in chains(tree, bound):
        if len(chain) > 1:
            attribute = chain[1]
            assert isinstance(attribute, ast.Attribute)
            if attribute.attr not in EXPORTS[module] | inside and not attribute.attr.startswith("__"):
                text = advice(f"nvflare.client.{attribute.attr}")
                found.add(
                    Remark(attribute.lineno, f"{bound}.{attribute.attr}", f"{module} has no {attribute.attr}: {text}")
                )
    return found
