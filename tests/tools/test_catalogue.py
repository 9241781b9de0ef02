"""The catalogue is correct: its pages are up to date, and what they say about scripts, rules and
fields is true.
"""

import importlib.util
import re
import subprocess
import sys
from math import ceil
from pathlib import Path
from types import ModuleType

import pytest

from fedpool import CyclicRecipe, FedEvalRecipe, Recipe
from fedpool.flows.averaging import AveragingRecipe
from fedpool.flows.recipes import BUILT_IN, built_in
from fedpool.tasks.aggregators import AGGREGATORS
from fedpool.training_recipe import TrainingRecipe
from tools.catalogue.docstrings import describe, describe_script
from tools.catalogue.pages import FIGURES, figures, page_name, pages, script

ROOT = Path(__file__).parents[2]
PAPER = re.compile(r"Paper:\s+\[")
FOLDER = ROOT / "docs" / "recipes"
KINDS = list(built_in().values())
PAGES = pages(ROOT / "docs")


def code_of(markdown: str) -> list[str]:
    """The lines of a page's Python blocks, without indentation and comments."""
    lines = "\n".join(re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


def test_the_pages_in_docs_are_what_make_catalogue_would_write() -> None:
    written = {path.stem: path.read_text() for path in FOLDER.glob("*.md")}
    assert written.keys() == PAGES.keys()
    stale = [name for name, text in PAGES.items() if written[name] != text]
    assert stale == [], "run make catalogue, and commit what it changes"


def test_the_module_writes_them(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tools.catalogue", str(tmp_path)], check=True, cwd=ROOT)
    assert {path.name: path.read_text() for path in (tmp_path / "recipes").iterdir()} == {
        f"{name}.md": text for name, text in pages(tmp_path).items()
    }
    assert "## Measured" not in (tmp_path / "recipes/fedavg.md").read_text()  # there is no fidelity.md


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_every_part(kind: type[Recipe]) -> None:
    page = PAGES[page_name(kind)]
    assert page.startswith(f"# {kind.__name__}\n")
    trains = issubclass(kind, TrainingRecipe)
    assert bool(PAPER.search(page)) == ("## Update rule" in page) == trains
    assert "## Client script" in page and "```python" in page and "## Parameters" in page and "## Example" in page
    assert "Raises:" not in page and "See `" not in page


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_the_client_script_are_those_of_the_example(kind: type[Recipe]) -> None:
    found = script(kind)
    example = [line.split("  #")[0].strip() for line in (ROOT / found.example).read_text().splitlines()]
    assert [line for line in code_of(found.text) if line not in example] == []
    assert (ROOT / found.example).with_name("job.py").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_can_be_given_is_on_the_page_or_on_those_it_refers_to(kind: type[Recipe]) -> None:
    page = PAGES[page_name(kind)]
    shared = PAGES["fields"] + (PAGES["aggregators"] if issubclass(kind, AveragingRecipe) else "")
    for name in kind.model_fields:
        assert f"| `{name}` |" in page + shared or name == "aggregator"
    assert ("aggregators.md" in page) == issubclass(kind, AveragingRecipe)


def test_a_field_has_its_type_bounds_default_and_meaning() -> None:
    assert "| `fedprox_mu` | `float`, from 0, finite | required | weight of the proximal term" in PAGES["fedprox"]
    assert (
        "| `min_clients` | `int`, from 1 to 1 | `1` |" in PAGES["cyclic"]
    )  # a field of every recipe, with its own bounds
    fields = PAGES["fields"]
    assert "| `name` | `str`, up to 64 characters | required |" in fields
    assert "| `num_rounds` | `int`, from 1 to 100,000 | required |" in fields
    assert '| `params_transfer_type` | `"FULL" or "DIFF"` | `"FULL"` |' in fields
    assert "| `seed` | `int`, from 0, below 2^63 | `0` |" in fields
    assert "| `round_timeout` | `float or None`, above 0, finite | `None` |" in fields
    assert "| `exclude_vars` | `tuple[str, ...]` | `()` |" in fields


def test_a_docstring_gives_up_its_paper_its_code_and_its_formal_sections() -> None:
    found = describe(
        """One sentence,
        on two lines.

        It does this:

            w <- w_k

        Paper:
            Doe et al. 2020, "A Title", section 3
            (https://example.org/1)

        Raises:
            ValueError: never.
        """
    )
    assert found.summary == "One sentence, on two lines."
    assert found.paper == '["A Title"](https://example.org/1), Doe et al. 2020, section 3'
    assert found.rest == "It does this:\n\n```text\nw <- w_k\n```"


def test_a_paper_that_cannot_be_read_is_refused_with_the_form_that_can() -> None:
    found = describe("""One sentence.\n\nPaper:\n    Doe 2020, A Title\n""")
    with pytest.raises(ValueError, match=r"'Doe 2020, A Title': write it as 'Doe et al. 2020"):
        _ = found.paper


def test_a_recipe_that_says_nothing_of_the_client_script_is_refused() -> None:
    class Silent:
        """One sentence."""

    with pytest.raises(ValueError, match="Silent has no section 'Client script: FILE'"):
        describe_script(Silent)


@pytest.mark.parametrize("kind", [FedEvalRecipe, CyclicRecipe])
def test_the_index_has_a_line_for_each_recipe(kind: type[Recipe]) -> None:
    lines = [line for line in PAGES["README"].splitlines() if line.startswith("| [`")]
    assert len(lines) == len(BUILT_IN)
    summary = describe(kind.__doc__).summary
    assert [line for line in lines if line.startswith(f"| [`{kind.__name__}`]({page_name(kind)}.md) | {summary} |")]


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("f", [1, 2, 3])
def test_an_aggregator_needs_as_many_updates_as_its_page_says(name: str, f: int) -> None:
    kind = AGGREGATORS[name]
    (section,) = (part for part in PAGES["aggregators"].split("\n## ") if part.splitlines()[0] == kind.__name__)
    stated = re.search(r"^- Needs: n >= ([^\n(]+?(?:\([^\n]*?\))?)(?: \([a-z ]+\))?$", section, re.MULTILINE)
    assert stated
    for m in (1, 7):
        values = {"num_byzantine": f, "trim_ratio": 0.1 * f, "num_selected": m, "clip_norm": 1.0}
        given = kind(**{field: value for field, value in values.items() if field in kind.model_fields})
        formula = re.sub(r"(\d) f", r"\1 * f", stated[1])
        assert given.fewest == ceil(eval(formula, {"f": f, "m": m, "trim_ratio": 0.1 * f}))
    assert PAPER.search(section)
    assert all(f"| `{field}` |" in section for field in kind.model_fields if field != "kind")


def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle_of_catalogue", ROOT / "benchmarks" / "oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def test_every_case_of_the_oracle_would_be_on_the_page_of_its_recipe_and_on_no_other() -> None:
    import tools.catalogue.pages as catalogue

    for case in oracle().CASES.values():
        found = [page for page in FIGURES if catalogue._measured(page, {case.name: ("0.1", "0.1")})]
        assert found == ["aggregators" if case.num_hostile else case.recipe.__name__], case.name


def test_a_figure_on_a_page_is_that_of_the_table_of_fidelity() -> None:
    table = figures((ROOT / "docs" / "fidelity.md").read_text())
    rows = {name for name in table if name.startswith("fedavg-")}
    assert rows
    for name in rows:
        assert f"| {name} | {' | '.join(table[name])} |" in PAGES["fedavg"]
