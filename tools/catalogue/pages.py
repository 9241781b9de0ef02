"""The pages of the recipe catalogue, `docs/recipes/`: one per recipe, built from docstrings, fields
and measured figures.

A page takes the mechanism from the docstring of the recipe's module, and the paper from its section
`Paper`. The docstring of the recipe's class says when to use it; its section `Client script: FILE`
describes the script. The docstring of the strategy describes the update at the server. An
aggregator's section `Needs` is the number of updates that it needs.
"""

import inspect
import re
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import get_type_hints

import mdformat

from fedpool.flows.averaging import AveragingRecipe
from fedpool.flows.evaluation import EvaluationRecipe
from fedpool.flows.fedavg import FedAvgRecipe
from fedpool.flows.recipes import built_in
from fedpool.recipe import Recipe
from fedpool.tasks.aggregators import AGGREGATORS, Rule
from fedpool.tasks.choose_aggregator import plain_names
from fedpool.training_recipe import TrainingRecipe
from tools.catalogue.docstrings import Script, describe, describe_script
from tools.catalogue.tables import cells, field_table, table

FIGURES: Mapping[str, tuple[str, ...]] = {
    "FedAvgRecipe": ("fedavg-*",),
    "FedProxRecipe": ("fedprox-*",),
    "FedOptRecipe": ("fedadam", "fedyogi", "fedadagrad"),
    "ScaffoldRecipe": ("scaffold-*",),
    "DiLoCoRecipe": ("diloco",),
    "CyclicRecipe": ("cyclic",),
    "aggregators": ("hostile-*",),
}
"""Page -> patterns of its rows in docs/fidelity.md."""

_LAYOUT = {"wrap": 100, "number": True, "compact_tables": True}  # as .mdformat.toml has it
_CODE = re.compile(r"```.*?```", re.DOTALL)
_OWN_AGGREGATOR = Path(__file__).with_name("own_aggregator.md")
_FIGURE = re.compile(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \|.* \w+ \|$", re.MULTILINE)


def page_name(kind: type[Recipe]) -> str:
    """The name of a recipe's page: fedavg for FedAvgRecipe."""
    return kind.__name__.removesuffix("Recipe").lower()


def script(kind: type[Recipe]) -> Script:
    """A recipe's client script, with the code of federated averaging if the docstring has none."""
    found = describe_script(kind)
    if _CODE.search(found.text):
        return found
    code = _CODE.search(describe_script(FedAvgRecipe).text)
    assert code, "federated averaging has code"
    return Script(f"{found.text}\n\n{code[0]}", found.example)


def figures(fidelity: str) -> Mapping[str, tuple[str, str]]:
    """Row of docs/fidelity.md -> accuracy of the reference, and ours."""
    return {row: (oracle, ours) for row, oracle, ours in _FIGURE.findall(fidelity)}


def pages(docs: Path) -> Mapping[str, str]:
    """Name -> the text of each page: README, fields, aggregators, and one for each recipe.

    Args:
        docs: folder of fidelity.md; without that file the pages have no measured figures.
    """
    file = docs / "fidelity.md"
    measured = figures(file.read_text()) if file.exists() else {}
    recipes = {page_name(kind): _recipe_page(kind, measured) for kind in built_in().values()}
    return {"README": _index(), **recipes, "fields": _fields_page(), "aggregators": _aggregators_page(measured)}


def _index() -> str:
    rows = []
    for kind in built_in().values():
        paper = describe(sys.modules[kind.__module__].__doc__).paper
        rows.append((f"[`{kind.__name__}`]({page_name(kind)}.md)", describe(kind.__doc__).summary, paper or "none"))
    return _page(
        "Recipes",
        "A recipe is an algorithm with its parameters. `fedpool recipe list` prints this table, and `fedpool recipe show` "
        "prints a page.",
        table(("recipe", "what it is for", "paper"), rows),
        "- [fields.md](fields.md): the fields that every recipe has\n"
        "- [aggregators.md](aggregators.md): how the updates of a round are combined: robust rules, and your own",
    )


def _recipe_page(kind: type[Recipe], measured: Mapping[str, tuple[str, str]]) -> str:
    use, how, client = describe(kind.__doc__), describe(sys.modules[kind.__module__].__doc__), script(kind)
    server = describe(inspect.getdoc(get_type_hints(kind.strategy)["return"]))
    trains = not issubclass(kind, EvaluationRecipe)
    example = client.example
    return _page(
        kind.__name__,
        use.summary,
        use.rest,
        f"Paper: {how.paper}." if how.paper else "",
        "## Update rule" if trains else "## What happens",
        how.summary,
        how.rest,
        f"At the server:\n\n```text\n{server.summary}\n```\n\n{server.rest}" if trains else "",
        "## Client script",
        client.text,
        "## Parameters",
        _own_fields(kind),
        _measured(kind.__name__, measured),
        "## Example",
        f"[{example}](../../{example}); [{example.parent}/job.py](../../{example.parent}/job.py) runs it.",
    )


def _own_fields(kind: type[Recipe]) -> str:
    base = next(base for base in (AveragingRecipe, TrainingRecipe, Recipe) if issubclass(kind, base))
    own = {
        name: field
        for name, field in kind.model_fields.items()
        if name == "late" or name not in base.model_fields or cells(name, field) != cells(name, base.model_fields[name])
    }
    shared = "the fields of every recipe" + (" that trains" if issubclass(kind, TrainingRecipe) else "")
    shared += " ([docs/recipes/fields.md](fields.md))"
    if base is AveragingRecipe:
        shared += ", and `aggregator` ([docs/recipes/aggregators.md](aggregators.md))"
    return f"{field_table(own)}\n\nIt also has {shared}." if own else f"It has only {shared}."


def _fields_page() -> str:
    return _page(
        "The fields of every recipe",
        "All are keyword arguments, and unknown ones are refused. [docs/recipe.md](../recipe.md) says more about model, "
        "bundle, scores and sites.",
        field_table(Recipe.model_fields),
        "## Fields of recipes that train",
        field_table(
            {name: field for name, field in TrainingRecipe.model_fields.items() if name not in Recipe.model_fields}
        ),
    )


def _aggregators_page(measured: Mapping[str, tuple[str, str]]) -> str:
    use = [f"[`{k.__name__}`]({page_name(k)}.md)" for k in built_in().values() if issubclass(k, AveragingRecipe)]
    plain = ", ".join(f'`"{name}"`' for name in plain_names())
    return _page(
        "Aggregators",
        f"An aggregator combines the updates of a round. These recipes take one: {', '.join(use)}. An example is "
        "`aggregator=Krum(num_byzantine=2)`. `fedpool` exports the classes. If an aggregator has no required parameters, its "
        f"name is enough: {plain}. A deployment's parameters and `job.json` hold it as JSON, "
        '`{"kind": "krum", "num_byzantine": 2}`. `prefect deployment run -p aggregator=...` takes a name or JSON.',
        "Below, n is the number of accepted updates of a round with a weight above 0, and f = `num_byzantine` of them may be "
        "arbitrary. A recipe is refused if its `min_clients` allows a round with fewer updates than its aggregator needs.",
        *(_aggregator_section(name, kind) for name, kind in AGGREGATORS.items()),
        _measured("aggregators", measured),
        _OWN_AGGREGATOR.read_text(),
    )


def _aggregator_section(name: str, kind: type[Rule]) -> str:
    about = describe(kind.__doc__)
    if "needs" not in about.sections:
        raise ValueError(f"the docstring of {kind.__name__} has no section Needs: say how many updates it works with")
    own = {field: info for field, info in kind.model_fields.items() if field != "kind"}
    facts = (
        f"- Needs: {about.sections['needs'].text}",
        f"- Paper: {about.paper}",
        f'- In JSON: `{{"kind": "{name}"{", ..." if own else ""}}}`',
    )
    parts = (f"## {kind.__name__}", about.summary, about.rest, field_table(own) if own else "", "\n".join(facts))
    return "\n\n".join(part for part in parts if part)


def _measured(page: str, measured: Mapping[str, tuple[str, str]]) -> str:
    rows = [
        (name, *values) for name, values in measured.items() if any(fnmatch(name, row) for row in FIGURES.get(page, ()))
    ]
    if not rows:
        return ""
    return (
        "## Measured\n\nAccuracy compared with a framework-free reference, from [docs/fidelity.md](../fidelity.md).\n\n"
        + table(("case", "reference", "fedpool"), rows)
    )


def _page(title: str, *parts: str) -> str:
    comment = (
        "<!-- Written by `make catalogue` from the docstrings in flows/ and tasks/: change them, not this page. -->"
    )
    text = "\n\n".join((f"# {title}", comment, *(part.strip() for part in parts if part.strip())))
    return mdformat.text(text, options=_LAYOUT, extensions=("gfm", "tables"))
