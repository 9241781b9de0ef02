"""The recipe catalogue, `docs/recipes/`: a page for each recipe, made of docstrings, fields and what was measured.

From the docstring of its module a page has the paper and the mechanism; from that of its class when to use it and, under
"Client script, as in FILE:", what the script has to do; from that of its strategy what the server does. An indented block in
them is code. `python -m fedpool.flows.catalogue docs` writes the pages, and `fedpool recipe show` prints one.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from fedpool.errors import ConfigError
from fedpool.flows.averaging import AveragingRecipe
from fedpool.flows.evaluation import EvaluationRecipe
from fedpool.flows.fedavg import FedAvgRecipe
from fedpool.flows.recipes import BUILT_IN, built_in, class_name
from fedpool.recipe import Recipe
from fedpool.tasks.aggregators import PARAMETERS, Aggregator, make_aggregator

DOCS = Path(__file__).resolve().parents[1] / "docs"
"""Of the checkout; an installed package has none."""

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

_BLOCK = 2**20  # from here on a bound is a power of two for the machine's sake
_BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}", "max_length": "up to {} characters"}
_CODE = re.compile(r"```.*?```", re.DOTALL)
_FORMAL = re.compile(r"^(?:Args|Attributes|Raises):$", re.MULTILINE)
_SCRIPT = re.compile(r"^Client script, as in (\S+):$", re.MULTILINE)
_NEEDS = re.compile(r"\s*Needs\s+(n >= [^.:]+)(?:: ([^.]+))?\.")
_PAPER = re.compile(
    r'([A-Z][^".]*? et al\.) (\d{4}),\s"([^"]+)"(?:,\s(.*?))?\s\((https://[^)]+)\)\.?\s*', re.MULTILINE | re.DOTALL
)
_FIGURE = re.compile(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \|.* \w+ \|$", re.MULTILINE)


@dataclass(frozen=True)
class Description:
    """What a docstring says, in markdown, and the paper that it cites."""

    summary: str
    rest: str
    paper: str = ""


@dataclass(frozen=True)
class Script:
    """What the client script of a recipe has to do, in markdown, and the example that does it."""

    text: str
    example: str


def describe(docstring: str) -> Description:
    """A docstring without its formal sections and its paper."""
    text = _SCRIPT.split(_FORMAL.split(inspect.cleandoc(docstring))[0])[0]
    paper = ""
    if found := _PAPER.search(text):
        authors, year, title, place, url = (" ".join((part or "").split()) for part in found.groups())
        paper = f'["{title}"]({url}), {authors} {year}{", " if place else ""}{place}'
        text = text[: found.start()] + text[found.end() :]
    summary, _, rest = text.strip().partition("\n\n")
    return Description(" ".join(summary.split()), _markdown(rest, "text"), paper)


def script(kind: type[Recipe]) -> Script:
    """What a recipe asks of the client script; of one that asks for nothing more, what federated averaging does."""
    _, example, text = _SCRIPT.split(_FORMAL.split(inspect.getdoc(kind) or "")[0])
    text = _markdown(textwrap.dedent(text.strip("\n")), "python\n# client.py")
    if not (code := _CODE.search(text)):
        code = _CODE.search(script(FedAvgRecipe).text)
        assert code, "federated averaging has its lines"
        text += f"\n\n{code[0]}"
    return Script(text, example)


def page_name(kind: type[Recipe]) -> str:
    """What the page of a recipe is called: fedavg for FedAvgRecipe."""
    return kind.__name__.removesuffix("Recipe").lower()


def figures(fidelity: str) -> Mapping[str, tuple[str, str]]:
    """Row of docs/fidelity.md -> accuracy of the reference, and ours."""
    return {row: (oracle, ours) for row, oracle, ours in _FIGURE.findall(fidelity)}


def pages(docs: Path = DOCS) -> Mapping[str, str]:
    """Name -> the text of each page: README, fields, aggregators, and one for each recipe.

    Args:
        docs: folder of fidelity.md; without that file the pages have no measured figures.
    """
    file = docs / "fidelity.md"
    measured = figures(file.read_text()) if file.exists() else {}
    recipes = {page_name(kind): _recipe_page(kind, measured) for kind in built_in().values()}
    return {"README": _index(), **recipes, "fields": _fields_page(), "aggregators": _aggregators_page(measured)}


def find(name: str) -> str:
    """The page of a recipe, by the name of its class or of the page, in whatever case.

    Raises:
        ConfigError: there is none.
    """
    found = pages()
    wanted = re.sub(r"[-_\s]", "", name).lower().removesuffix("recipe")
    if wanted not in found:
        others = "fields, aggregators"
        raise ConfigError(
            f"there is no recipe {name!r}: there are {', '.join(map(class_name, BUILT_IN.values()))}, and the pages {others}"
        )
    return found[wanted]


def _index() -> str:
    rows = []
    for kind in built_in().values():
        paper = describe(_module_doc(kind)).paper
        rows.append(
            (f"[`{kind.__name__}`]({page_name(kind)}.md)", describe(kind.__doc__ or "").summary, paper or "none")
        )
    return _page(
        "Recipes",
        "A recipe is an algorithm with its parameters. `fedpool recipe list` prints this table, `fedpool recipe show` a page.",
        _table(("recipe", "what it is for", "paper"), rows),
        "- [fields.md](fields.md): the fields that every recipe has\n"
        "- [aggregators.md](aggregators.md): how updates become one: robust rules, and one of your own",
    )


def _recipe_page(kind: type[Recipe], measured: Mapping[str, tuple[str, str]]) -> str:
    use, how, client = describe(kind.__doc__ or ""), describe(_module_doc(kind)), script(kind)
    server = describe(inspect.getdoc(get_type_hints(kind.strategy)["return"]) or "")
    trains = not issubclass(kind, EvaluationRecipe)
    example = Path(client.example)
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
        f"[{example}](../../{example}), which [{example.parent}/job.py](../../{example.parent}/job.py) runs.",
    )


def _own_fields(kind: type[Recipe]) -> str:
    base = AveragingRecipe if issubclass(kind, AveragingRecipe) else Recipe
    own, fixed = {}, []
    for name, field in kind.model_fields.items():
        if field.exclude:
            fixed.append(f"`{name}`")
        elif name not in base.model_fields or _cells(name, field) != _cells(name, base.model_fields[name]):
            own[name] = field
    others = "those of every recipe, [docs/recipes/fields.md](fields.md)"
    if base is AveragingRecipe:
        others += ", and the aggregator with its parameters, [docs/recipes/aggregators.md](aggregators.md)"
    return "\n\n".join(
        (
            _field_table(own) if own else "None of its own.",
            f"{'Its other' if own else 'Its'} fields are {others}.",
            *((f"Not to be given, because nothing is trained or it is settled: {', '.join(fixed)}.",) if fixed else ()),
        )
    )


def _fields_page() -> str:
    return _page(
        "The fields of every recipe",
        "All are keyword arguments, and unknown ones are refused. [docs/recipe.md](../recipe.md) says more of model, "
        "bundle, scores and sites.",
        _field_table(Recipe.model_fields),
    )


def _aggregators_page(measured: Mapping[str, tuple[str, str]]) -> str:
    use = [f"[`{k.__name__}`]({page_name(k)}.md)" for k in built_in().values() if issubclass(k, AveragingRecipe)]
    own = {name: field for name, field in AveragingRecipe.model_fields.items() if name not in Recipe.model_fields}
    kinds: dict[type[Aggregator], list[str]] = {}
    for name in PARAMETERS:
        kinds.setdefault(type(aggregator(name)), []).append(name)
    return _page(
        "Aggregators",
        f'How the updates of a round become one: `aggregator="median"`, say, in {", ".join(use)}.',
        "Below, n are the updates of a round that were accepted and have a weight above 0, and f = `num_byzantine` of them may "
        "be arbitrary. A recipe is refused whose `min_clients` lets a round have fewer updates than its aggregator needs.",
        "## Parameters",
        _field_table(own),
        *(_aggregator_section(kind, names) for kind, names in kinds.items()),
        _measured("aggregators", measured),
        _YOURS,
    )


def aggregator(name: str, num_byzantine: int = 1, trim_ratio: float = 0.2, num_selected: int = 1) -> Aggregator:
    """An aggregator by its name, with those of the parameters that are its own."""
    given = {"num_byzantine": num_byzantine, "trim_ratio": trim_ratio, "num_selected": num_selected, "clip_norm": 1.0}
    needed, allowed = PARAMETERS[name]
    own: dict[str, Any] = {what: value if what in (*needed, *allowed) else None for what, value in given.items()}
    return make_aggregator(name, **own, min_clients=sys.maxsize)


def _aggregator_section(kind: type[Aggregator], names: Sequence[str]) -> str:
    text = inspect.getdoc(kind) or ""
    needs = _NEEDS.search(text)
    assert needs, f"{kind.__name__} does not say how many updates it needs"
    about = describe(_NEEDS.sub("", text))
    parameters = []
    for name in names:
        needed, allowed = PARAMETERS[name]
        listed = [*(f"`{what}`" for what in needed), *(f"`{what}` if you like" for what in allowed)]
        parameters.append(f"{f'{name}: ' if len(names) > 1 else ''}{', '.join(listed) or 'none'}")
    return "\n".join(
        (
            f"## {', '.join(names)}",
            "",
            "\n\n".join(part for part in (about.summary, about.rest) if part),
            "",
            f"- Parameters: {'; '.join(parameters)}",
            f"- Needs: {' '.join(needs[1].split())}{f' ({needs[2]})' if needs[2] else ''}",
            f"- Paper: {about.paper}",
        )
    )


def _measured(page: str, measured: Mapping[str, tuple[str, str]]) -> str:
    rows = [
        (name, *values) for name, values in measured.items() if any(fnmatch(name, row) for row in FIGURES.get(page, ()))
    ]
    if not rows:
        return ""
    return (
        "## Measured\n\nAccuracy beside a reference without a framework; the rows of [docs/fidelity.md](../fidelity.md).\n\n"
        + _table(("case", "reference", "fedpool"), rows)
    )


def _module_doc(kind: type[Recipe]) -> str:
    return sys.modules[kind.__module__].__doc__ or ""


def _markdown(text: str, language: str) -> str:
    """Text whose indented blocks are code."""
    blocks = []
    for block in re.split(r"\n\n+", text.strip("\n")):
        code = block.startswith("    ")
        blocks.append(f"```{language}\n{textwrap.dedent(block)}\n```" if code else " ".join(block.split()))
    return "\n\n".join(blocks)


def _page(title: str, *parts: str) -> str:
    comment = (
        "<!-- Written by `make catalogue` from the docstrings in flows/ and tasks/: change them, not this page. -->"
    )
    return "\n\n".join((f"# {title}", comment, *(part.strip() for part in parts if part.strip()))) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _field_table(fields: Mapping[str, FieldInfo]) -> str:
    return _table(("field", "type", "default", "meaning"), (_cells(name, field) for name, field in fields.items()))


def _cells(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    kind = ", ".join((f"`{_type(field.annotation)}`", *_bounds(field)))
    default = "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
    return f"`{name}`", kind, default, field.description or ""


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (None, NoneType):
        return "None"
    if annotation is Any:
        return "object"
    if annotation is Ellipsis:
        return "..."
    if origin in (Union, UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(_value(argument) for argument in arguments)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type(argument) for argument in arguments)}]"
    return str(annotation.__name__)


def _bounds(field: FieldInfo) -> list[str]:
    found = []
    for bound in field.metadata:
        for attribute, words in _BOUNDS.items():
            if (value := getattr(bound, attribute, None)) is not None:
                found.append(words.format(f"2^{value.bit_length() - 1}" if value > _BLOCK else f"{value:,}"))
        if getattr(bound, "min_length", None):
            found.append("not empty")
        if getattr(bound, "allow_inf_nan", None) is False:
            found.append("finite")
    return [" ".join(found)] if len(found) == 2 and found[1].startswith("to ") else found


def _value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


_YOURS = '''
## A rule of your own

An aggregator may be a function of yours: `aggregator=my_rule`, or its path, `aggregator="my_rules:my_rule"`. It is given a piece
of a parameter as all updates have it, (n, elements), and their weights, (n,), both float64 and in the order of the sites
(`site-2` before `site-10`), and returns the aggregate, (elements,). Its module travels with the job, as that of an
[algorithm of your own](../../CONTRIBUTING.md#add-an-algorithm) does:

```python
# my_rules.py
import torch


def middle_half(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean of what lies between the quartiles, element by element."""
    quarter = len(values) // 4
    ordered = values.sort(dim=0).values
    return ordered[quarter : len(values) - quarter].mean(dim=0)
```

Of four sites, one here sends nonsense:

```python
# client.py
import fedpool.client as flare

flare.init()
step = 1000 if flare.get_site_name() == "site-2" else 1
while flare.is_running():
    params = flare.receive().params
    flare.send(flare.FLModel(params={"w": params["w"] + step}))
```

```python
# job.py
import numpy as np
from my_rules import middle_half

from fedpool import FedAvgRecipe, SimEnv

recipe = FedAvgRecipe(
    name="mine",
    min_clients=4,
    num_rounds=2,
    model={"w": np.zeros(3)},
    train_script="client.py",
    aggregator=middle_half,
)
assert recipe.aggregator == "my_rules:middle_half"  # what the job's record has
result = recipe.execute(env=SimEnv(num_clients=4)).get_result()
assert result.params["w"].tolist() == [2, 2, 2]
```

- Work element by element: a parameter comes in pieces, and how it is cut depends on its size.
- Give the same bits for the same inputs, so that `fedpool job verify` finds what the job found.
- The coordinator imports the function, and so does whoever verifies, replays or resumes the job: have its module installed there.
  A lambda or a function inside another one cannot be imported.
'''


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "recipes").mkdir(exist_ok=True)
    for page, text in pages(folder).items():
        (folder / "recipes" / f"{page}.md").write_text(text)
