"""Whether a client script takes part in rounds at all: by fedpool's client API, itself or
through what travels with it.
"""

import ast
from collections.abc import Collection, Mapping

from fedpool.errors import RecipeError


def missing_client(entry: str, trees: Mapping[str, ast.Module], contents: Collection[bytes]) -> str | None:
    """What to tell of a script in which nothing names fedpool; None of any other.

    It is not an error, because something that is installed may take part for it.

    Args:
        entry: name of the script's file.
        trees: file -> its source, parsed; the script and its modules.
        contents: of all that travels.

    Raises:
        RecipeError: the script holds nothing that runs, or begins by importing the client API of
            NVFlare and not fedpool's.
    """
    if all(_is_text(statement) for statement in trees[entry].body):
        raise RecipeError(
            f"train_script {entry} is empty: write a loop with fedpool.client into it, as the README has it"
        )
    if any(b"fedpool" in content for content in contents):
        return None
    for name, tree in trees.items():
        for statement in tree.body:  # what runs in any case: not under a condition, nor in a function
            if found := _imported_from_nvflare(statement):
                raise RecipeError(
                    f"{name} line {statement.lineno} imports {found}, and nothing of fedpool: change its imports by "
                    f"`fedpool migrate {name}`"
                )
    return (
        f"neither {entry} nor anything that travels with it names fedpool: unless something that is installed calls "
        "fedpool.client for it, it takes no part in the rounds, and the job fails"
    )


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _imported_from_nvflare(statement: ast.stmt) -> str | None:
    """The module of NVFlare's client API that a statement imports."""
    modules: list[str] = []
    if isinstance(statement, ast.Import):
        modules = [alias.name for alias in statement.names]
    elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
        modules = [f"{statement.module}.{alias.name}" for alias in statement.names]
    return next((name for name in modules if f"{name}.".startswith("nvflare.client.")), None)
