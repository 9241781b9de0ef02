"""House rules: who may import whom, links, module names, and a docstring on everything public."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedpool"
FOLDERS = ("sites", "tasks", "flows", "deployments")

# Lowest first. The base is everything in src/fedpool itself and its client.
LAYERS = ("base", *FOLDERS, "facade")
FACADE = ("__init__.py", "cli")

# The levels within the base, lowest first; a folder stands for everything in it. A client script
# loads no store, and a store no recipe.
BASE_LEVELS = (
    "storable errors bounds left_out model messages job_digest paths site_order tensors tensor_stream digest checked arrays "
    "inspection local_file patience exclusive refusals s3 loopback startup as_imported "
    "own_failures",
    "client",
    "backend upload download",
    "store written",
    "environment fields conditions exclude weights checkpoint initial stored_model bundle client_use early_settings "
    "script_files script_paths script_values user_code allowed_code stored_code filters filter_field",
    "training_terms executable restorable",
    "recipe",
    "training_recipe",
    "testing migration",  # tools beside the product
)

# What Prefect documents; None means the whole module. Everything else is named in one module, so
# that an upgrade fails in one place.
PREFECT_DOCUMENTS: dict[str, set[str] | None] = {
    "prefect": {"Flow", "flow", "task"},
    "prefect.artifacts": None,
    "prefect.client.orchestration": {"PrefectClient", "get_client"},
    "prefect.client.schemas.actions": None,
    "prefect.client.schemas.filters": None,
    "prefect.client.schemas.objects": None,
    "prefect.client.schemas.sorting": None,
    "prefect.context": {"FlowRunContext"},
    "prefect.events": {"emit_event"},
    "prefect.exceptions": {
        "CancelledRun",
        "ObjectAlreadyExists",
        "ObjectNotFound",
        "PrefectException",
        "PrefectHTTPStatusError",
    },
    "prefect.logging": {"get_logger", "get_run_logger"},
    "prefect.runtime": None,
    "prefect.schedules": None,
    "prefect.settings": None,
    "prefect.states": None,
    "prefect.workers.base": {"BaseJobConfiguration", "BaseVariables", "BaseWorker", "BaseWorkerResult"},
}
PREFECT_INTERNALS = "tasks/prefect_internals.py"

# Modules of a higher layer that a string names, and why that is necessary.
NAMED_ABOVE = {
    (
        "deployments/poc_services.py",
        "fedpool.cli",
    ): "a proof of concept's workers are processes of the command, as those in production are",
}

MODULES = sorted(
    {
        path
        for folder in (
            PACKAGE,
            *(PACKAGE / name for name in ("cli", "client", "testing")),
            *(PACKAGE / name for name in FOLDERS),
        )
        for path in folder.glob("**/*.py")
    }
)


def shown(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of_file(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    if parts[0] in FOLDERS:
        return parts[0]
    return "facade" if parts[0] in FACADE else "base"


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


def imported(path: Path, without: ast.NodeTransformer | None = None) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import of a module, including those inside functions."""
    tree = ast.parse(path.read_text(), filename=str(path))
    package = ["fedpool", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(without.visit(tree) if without else tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *([node.module] if node.module else [])))
            name = base if node.level else node.module or ""
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                yield node.lineno, inner if name.startswith("fedpool") and is_module(inner) else name


_NAMED = re.compile(r"(fedpool(?:\.\w+)+)(?:\.|:\w*)?")  # part of an f-string: its end may be missing


def named(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every string in a module that names one of our modules, or something
    in one.

    For example an argument of `import_module` or `python -m`, a Prefect entrypoint, a path
    `module:Class`, or the beginning of an f-string.
    """
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := _NAMED.fullmatch(node.value)):
            parts = match[1].split(".")
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
            if module := next((name for name in prefixes if is_module(name)), None):
                yield node.lineno, module


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("fedpool", *(parts[:-1] if parts[-1] == "__init__" else parts)))


class AtRunTime(ast.NodeTransformer):
    """Leaves out what only type checkers read, and functions too unless `functions` is true."""

    def __init__(self, *, functions: bool) -> None:
        self._functions = functions

    def visit_If(self, node: ast.If) -> ast.AST | Sequence[ast.AST]:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return [self.visit(other) for other in node.orelse]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return self.generic_visit(node) if self._functions else None

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST | None:
        return self.generic_visit(node) if self._functions else None


def needs(path: Path, *, functions: bool) -> set[str]:
    """Our modules that a module imports at run time: at its top level and, if `functions` is true,
    in its functions.
    """
    found = {name for _, name in imported(path, AtRunTime(functions=functions)) if name.split(".")[0] == "fedpool"}
    return found - {module_of(path)}


def level_of(module: str) -> int:
    """The level of a module of the base."""
    (level,) = (number for number, names in enumerate(BASE_LEVELS) if module.split(".")[1] in names.split())
    return level


def test_the_modules_are_found() -> None:
    names = {shown(path) for path in MODULES}
    assert {
        "errors.py",
        "client/api.py",
        "sites/script_session.py",
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


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_a_module_names_nothing_from_a_layer_above_its_own(path: Path) -> None:
    own = LAYERS.index(layer_of_file(path))
    above = [
        f"line {line}: {name!r}"
        for line, name in named(path)
        if (layer := layer_of_name(name)) is not None and LAYERS.index(layer) > own
        if (shown(path), name) not in NAMED_ABOVE
    ]
    assert above == []


def test_every_exception_is_needed() -> None:
    assert all(name in {found for _, found in named(PACKAGE / path)} for path, name in NAMED_ABOVE)


def test_a_module_that_is_named_by_a_string_is_seen_in_each_form() -> None:
    assert "fedpool.flows.job" in [
        name for _, name in named(PACKAGE / "deployments/sim_api.py")
    ]  # import_module("...")
    assert "fedpool.tasks.mean" in [name for _, name in named(PACKAGE / "__init__.py")]  # the home of a name
    assert "fedpool.flows.site_round" in [
        name for _, name in named(PACKAGE / "flows/site_round.py")
    ]  # module.attribute
    assert "fedpool.flows" in [
        name for _, name in named(PACKAGE / "flows/recipes.py")
    ]  # f"fedpool.flows.{name}:{kind}"
    assert list(named(PACKAGE / "tasks/events.py")) == []  # "fedpool.update.rejected" is not a module


def undocumented_of_prefect(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of everything undocumented in Prefect that a module uses, by an import or a
    string.
    """
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names if each.name.startswith("prefect."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "prefect":
            allowed = PREFECT_DOCUMENTS.get(node.module, set())
            for each in node.names:
                if each.name.startswith("_") or (allowed is not None and each.name not in allowed):
                    yield node.lineno, f"{node.module}.{each.name}"
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"prefect(?!\.resource)(\.[a-z_]+)+|PREFECT__\w+", str(node.value)
        ):
            yield node.lineno, str(node.value)


@pytest.mark.parametrize("path", [path for path in MODULES if shown(path) != PREFECT_INTERNALS], ids=shown)
def test_what_prefect_does_not_document_is_named_in_one_module(path: Path) -> None:
    assert list(undocumented_of_prefect(path)) == []


def test_in_that_module_such_names_are_seen_in_each_form() -> None:
    found = {name for _, name in undocumented_of_prefect(PACKAGE / PREFECT_INTERNALS)}
    assert {
        "prefect.utilities.engine.propose_state",  # an import
        "prefect.context.TagsContext",  # an undocumented name in a documented module
        "prefect.flow_engine",  # a string
        "PREFECT__FLOW_RUN_ID",
    } <= found


def test_no_modules_need_each_other() -> None:
    graph = {module_of(path): needs(path, functions=False) for path in MODULES}
    assert "fedpool.store" in graph["fedpool.written"] and "fedpool.recipe" not in graph["fedpool.environment"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"they import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", [path for path in MODULES if layer_of_file(path) == "base"], ids=shown)
def test_a_module_of_the_base_imports_nothing_from_a_level_above_its_own(path: Path) -> None:
    own = level_of(module_of(path))
    assert [name for name in sorted(needs(path, functions=True)) if level_of(name) > own] == []


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


def undocumented(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(name, class) of everything public without a docstring: a module's classes and functions, and
    the methods of its public classes.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and not is_overload(node):
                yield node.name, None
            if isinstance(node, ast.ClassDef):
                yield from (
                    (f"{node.name}.{inner.name}", node.name)
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
                    and not inner.name.startswith("_")
                    and not ast.get_docstring(inner)
                    and not is_overload(inner)
                )


def is_overload(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a node is an overload's signature, not the function itself."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def documented_by_a_base(path: Path, kind: str, method: str) -> bool:
    """Whether a method overrides one that has a docstring, which then describes it."""
    module = importlib.import_module(".".join(("fedpool", *path.relative_to(PACKAGE).with_suffix("").parts)))
    bases = getattr(module, kind).__mro__[1:]
    return any(getattr(getattr(base, method, None), "__doc__", None) for base in bases if base is not object)


@pytest.mark.parametrize("path", [path for path in MODULES if path.stat().st_size], ids=shown)
def test_everything_public_has_a_docstring_of_its_own_or_of_what_it_overrides(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = [
        name
        for name, kind in undocumented(tree)
        if not (kind is not None and documented_by_a_base(path, kind, name.rpartition(".")[2]))
    ]
    assert ast.get_docstring(tree), "the module has none"
    assert missing == []
