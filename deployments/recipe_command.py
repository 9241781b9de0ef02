"""The command `fedpool recipe`: which recipes there are, and what each does. It needs no server, and does not load Prefect."""

import re
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from fedpool.deployments.terminal import open_console

recipe = App(name="recipe", help="Recipes: the algorithms that there are.")

_COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)
_FIELD_HEADER = re.compile(r"^\| field \| .*\n\| --- .*\n", re.MULTILINE)
_FIELD = re.compile(
    r"^\| (`\w+`) \| (.*?) \| (.*?) \| (.*) \|$", re.MULTILINE
)  # four columns, which no other table has
_LOCAL_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


@recipe.command(name="list")
def list_() -> None:
    """The recipes, each in one sentence."""
    from fedpool.flows.catalogue import describe  # loads torch, which `fedpool --help` can do without
    from fedpool.flows.recipes import built_in

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is for")
    for name, kind in built_in().items():
        table.add_row(name, describe(kind.__doc__ or "").summary.replace("`", ""))
    open_console().print(table, highlight=False, markup=False)


@recipe.command
def show(
    name: Annotated[
        str, Parameter(help="name of the recipe, such as FedOptRecipe or fedopt; or fields, or aggregators")
    ],
) -> None:
    """What a recipe does, what the client script has to do for it, and its fields: its page of docs/recipes."""
    from fedpool.flows.catalogue import find

    Console().print(Markdown(_for_terminal(find(name)), hyperlinks=False))


def _for_terminal(page: str) -> str:
    """A page without what only a browser has a use for, and with the fields as a list: a terminal is too narrow for the table."""
    text = _COMMENT.sub("", page).replace("\n# client.py\n", "\n")
    text = _FIELD.sub(r"- \1, \2, default \3: \4", _FIELD_HEADER.sub("", text)).replace(
        ", default required:", ", required:"
    )
    return _LOCAL_LINK.sub(r"\1", text)
