"""The code of a recipe that isn't part of fedpool: what travels with a job, and what can't."""

from collections.abc import Iterator

from fedpool import filter_field
from fedpool.errors import RecipeError
from fedpool.filters import type_of_filter
from fedpool.flows.recipes import BUILT_IN, GROUP, class_name, is_registered, type_of
from fedpool.recipe import Recipe
from fedpool.user_code import Code, build_code, find_home, is_installed


def code_of(recipe: Recipe) -> Code | None:
    """The code that travels with a job of the recipe; None if there is none, or if it can't travel.

    Raises:
        RecipeError: see `build_code`.
    """
    modules = [path.partition(":")[0] for path in _own(recipe) if _why_it_stays(path, recipe) is None]
    return build_code(modules) if modules else None


def filter_code_of(recipe: Recipe) -> Code | None:
    """The code of its filters, which the sites need; None as in `code_of`.

    Raises:
        RecipeError: see `build_code`.
    """
    modules = [path.partition(":")[0] for path in _own_filters(recipe) if _why_it_stays(path, recipe) is None]
    return build_code(modules) if modules else None


def why_it_stays(recipe: Recipe) -> str | None:
    """Why a recipe runs only in this process, with the remedy; None if it runs anywhere."""
    return next((why for path in _own(recipe) if (why := _why_it_stays(path, recipe))), None)


def check_travels(recipe: Recipe) -> None:
    """Refuse a recipe whose code can't travel to another process.

    Raises:
        RecipeError: see `why_it_stays` and `build_code`.
    """
    if why := why_it_stays(recipe):
        raise RecipeError(why)
    code_of(recipe)


def check_strategy(recipe: Recipe, num_sites: int) -> None:
    """Refuse a recipe whose strategy can't be made.

    Raises:
        RecipeError: see `strategy_of`.
    """
    from fedpool.tasks.guarded import strategy_of  # loads torch, which the command doesn't need

    strategy_of(recipe, num_sites)


def _own(recipe: Recipe) -> Iterator[str]:
    """The `module:name` of a recipe's code that is neither fedpool's nor installed."""
    full = type_of(type(recipe))
    if full not in BUILT_IN.values() and not is_registered(full):
        yield full
    yield from (path for path in recipe.functions if not is_installed(path.partition(":")[0]))
    yield from _own_filters(recipe)


def _own_filters(recipe: Recipe) -> Iterator[str]:
    """The `module:Class` of the filters that are neither fedpool's nor registered."""
    for path in map(type_of_filter, recipe.filters):
        if not path.startswith("fedpool.") and not filter_field.is_registered(path):
            yield path


def _why_it_stays(path: str, recipe: Recipe) -> str | None:
    module, _, name = path.partition(":")
    is_filter = path in map(type_of_filter, recipe.filters)
    what, group = ("filter", filter_field.GROUP) if is_filter else ("function", GROUP)
    what = f"class {class_name(path)}" if path == type_of(type(recipe)) else f"{what} {name}"
    if is_installed(module):
        return (
            f"{what} is in the installed module {module}, which does not register it: give its package the entry point "
            f'[project.entry-points."{group}"] {module.rpartition(".")[2]} = "{path}"'
        )
    if "<locals>" in name:
        return f"{what} is defined inside a function of {module}: define it at the top of a module"
    if find_home(module) is None:
        where = "the script itself" if module in ("__main__", "<run_path>") else f"{module}, which has no source file"
        return f"{what} is defined in {where}: put it into a module beside the script, and import it from there"
    return None
