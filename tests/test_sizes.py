"""No module is longer than you can read in one sitting, and no function of a round is longer than a
screen.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src/fedpool", "flows", "tasks", "sites", "deployments")
MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 40
ROUND = (
    "flows/round.py",
    "flows/ask.py",
    "flows/choose.py",
    "flows/take_up.py",
    "tasks/collect.py",
    "sites/site_round.py",
)
"""The modules that a round runs through."""


def modules() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted(path for path in (ROOT / folder).rglob("*.py") if not path.is_symlink())


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> dict[str, int]:
    """The number of lines of each function of a module, including docstrings, by `path:name`."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {f"{shown(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in found}


MODULES = list(modules())
FUNCTIONS = {name: lines for path in ROUND for name, lines in functions(ROOT / path).items()}


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_a_module_is_not_too_long(path: Path) -> None:
    assert num_lines(path) <= MAX_MODULE_LINES, "cut it by its matters"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_a_round_is_not_too_long(name: str) -> None:
    assert FUNCTIONS[name] <= MAX_FUNCTION_LINES, "cut it by its steps"


def test_the_modules_are_found() -> None:
    names = {shown(path) for path in MODULES}
    assert {"src/fedpool/store.py", "flows/job.py", "tasks/gate.py", "sites/local.py", "deployments/sim.py"} <= names
