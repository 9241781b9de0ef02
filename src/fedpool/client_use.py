"""Whether a client script takes part in rounds: it, or a file with it, must use fedpool."""

import ast
from collections.abc import Collection, Mapping

from fedpool.errors import RecipeError


def missing_client(entry: str, trees: Mapping[str, ast.Module], contents: Collection[bytes]) -> str | None:
    """A warning if neither the script nor a file that travels with it names fedpool, else None.

    It isn't an error, because an installed package may use fedpool on the script's behalf.

    Args:
        entry: name of the script's file.
        trees: file -> its parsed source, for the script and its modules.
        contents: the contents of all files that travel.

    Raises:
        RecipeError: the script contains no code, or imports NVFlare's client API, and nothing
            names fedpool.
    """
    if all(_is_text(statement) for statement in trees[entry].body):
        raise RecipeError(
            f"train_script {entry} is empty: write a loop with fedpool.client into it, like the one in the README"
        )
    if any(b"fedpool" in content for content in contents):
        return None
    for name, tree in trees.items():
        for statement in tree.body:  # unconditional statements only
            if found := _imported_from_nvflare(statement):
                raise RecipeError(
                    f"{name} line {statement.lineno} imports {found}, and nothing from fedpool: change its imports with "
                    f"`fedpool migrate {name}`"
                )
    return (
        f"neither {entry} nor a file that travels with it names fedpool: unless an installed package calls fedpool.client "
        "for it, the script takes no part in rounds and the job fails"
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
