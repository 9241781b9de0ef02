"""The command `fedpool recipe`: lists the recipes and describes each. Needs no server, and doesn't
load Prefect.

It prints the pages of docs/recipes, which are part of the package; `make catalogue` writes them.
"""

import inspect
import re
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from fedpool.deployments.terminal import open_console
from fedpool.errors import ConfigError

recipe = App(name="recipe", help="Recipes: the available algorithms.")

_COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)
_FIELD_HEADER = re.compile(r"^\| field \| .*\n\| --- .*\n", re.MULTILINE)
_FIELD = re.compile(r"^\| (`\w+`) \| (.*?) \| (.*?) \| (.*) \|$", re.MULTILINE)  # four columns, as in no other table
_LOCAL_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


@recipe.command(name="list")
def list_() -> None:
    """List the recipes, each in one sentence."""
    from fedpool.flows.recipes import built_in  # loads torch, which `fedpool --help` doesn't need

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is for")
    for name, kind in built_in().items():
        summary = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
        table.add_row(name, " ".join(summary.replace("`", "").split()))
    open_console().print(table, highlight=False, markup=False)


@recipe.command
def show(
    name: Annotated[
        str, Parameter(help="name of the recipe, such as FedOptRecipe or fedopt; or fields, or aggregators")
    ],
) -> None:
    """Show a recipe's page of docs/recipes: the algorithm, the client script that it needs, and
    its fields.
    """
    Console().print(Markdown(_for_terminal(find_page(name)), hyperlinks=False))


def find_page(name: str) -> str:
    """The page of a recipe, by the name of its class or page, in any case.

    Raises:
        ConfigError: there is no such page.
    """
    from fedpool.flows.recipes import BUILT_IN, class_name

    pages = _pages()
    wanted = re.sub(r"[-_\s]", "", name).lower().removesuffix("recipe")
    if wanted not in pages:
        known = ", ".join(map(class_name, BUILT_IN.values()))
        raise ConfigError(f"there is no recipe {name!r}: there are {known}, and the pages fields, aggregators")
    return pages[wanted].read_text(encoding="utf-8")


def _pages() -> Mapping[str, Traversable]:
    folder = files("fedpool") / "recipe_pages"  # a link to docs/recipes
    return {page.name.removesuffix(".md"): page for page in folder.iterdir() if page.name != "README.md"}


def _for_terminal(page: str) -> str:
    """A page for the terminal: without comments and local links, and with the fields as a list,
    because their table is too wide.
    """
    text = _COMMENT.sub("", page).replace("\n# client.py\n", "\n")
    text = _FIELD.sub(r"- \1, \2, default \3: \4", _FIELD_HEADER.sub("", text)).replace(
        ", default required:", ", required:"
    )
    return _LOCAL_LINK.sub(r"\1", text)
