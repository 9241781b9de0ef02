"""The house's rules: who may import whom, links, names of modules, and a docstring on everything public."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedpool"
FOLDERS = ("sites", "tasks", "flows", "deployments")

# Lowest first. The base is everything in src/fedpool itself and its client.
LAYERS = ("base", *FOLDERS, "facade")
FACADE = ("__init__.py", "cli.py")

MODULES = sorted(
    {
        path
        for folder in (PACKAGE, PACKAGE / "client", PACKAGE / "testing", *(PACKAGE / name for name in FOLDERS))
        for path in folder.glob("**/*.py")
    }
)


def shown(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of_file(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    if parts[0] in FOLDERS:
        return parts[0]
    return "facade" if len(parts) == 1 and parts[0] in FACADE else "base"


def layer_of_name(name: str) -> str | None:
    """The layer of an imported dotted name; None when it is not ours."""
    parts = name.split(".")
    if parts[0] != "fedpool":
        return None
    if len(parts) == 1 or parts[1] == "cli":
        return "facade"
    return parts[1] if parts[1] in FOLDERS else "base"


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import of a module, those inside functions included."""
    package = ["fedpool", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *([node.module] if node.module else [])))
            name = base if node.level else node.module or ""
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                yield node.lineno, inner if name.startswith("fedpool") and is_module(inner) else name


def test_the_modules_are_found() -> None:
    names = {shown(path) for path in MODULES}
    assert {
        "errors.py",
        "client/api.py",
        "sites/session.py",
        "tasks/gate.py",
        "flows/job.py",
        "deployments/sim.py",
    } <= names


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_a_module_imports_nothing_from_a_layer_above_its_own(path: Path) -> None:
    own = LAYERS.index(layer_of_file(path))
    above = [
        f"line {line}: {name}"
        for line, name in imported(path)
        if (layer := layer_of_name(name)) is not None and LAYERS.index(layer) > own
    ]
    assert above == []


def test_an_import_inside_a_function_is_seen_too() -> None:
    tree = ast.parse((PACKAGE / "arrays.py").read_text())
    top_level = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert "torch" not in top_level
    assert "torch" in [name for _, name in imported(PACKAGE / "arrays.py")]


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_no_import_is_relative(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level] == []


def test_no_module_bears_the_name_of_one_of_the_standard_library() -> None:
    names = {path.stem for path in MODULES} | set(FOLDERS) | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert names & (set(sys.stdlib_module_names) - {"__main__"}) == set()


@pytest.mark.parametrize("name", FOLDERS)
def test_the_package_holds_a_relative_link_to_the_folder(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{name}"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", FOLDERS)
def test_the_link_is_a_link_in_git_too(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--stage", f"src/fedpool/{name}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert listed.split()[:1] == ["120000"]
    assert len(listed.splitlines()) == 1


def public(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public classes and functions of a module, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    inner
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_")
                )


@pytest.mark.parametrize("path", [path for path in MODULES if path.stat().st_size], ids=shown)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = [node.name for node in public(tree) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), "the module has none"
    assert missing == []
