"""`fedpool recipe`: the catalogue in a terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedpool.cli import main
from fedpool.cli.recipe_command import find_page
from fedpool.flows.recipes import built_in

ROOT = Path(__file__).parents[2]


def fedpool(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The output of the command, which must exit with 0."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def test_list_has_every_recipe_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    lines = fedpool(capsys, "recipe", "list").splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["recipe", *built_in()]
    assert any(line.startswith("FedAvgRecipe ") and "start here" in line for line in lines)


@pytest.mark.parametrize("name", ["FedOptRecipe", "fedopt"])
def test_show_prints_what_the_page_says(capsys: pytest.CaptureFixture[str], name: str) -> None:
    shown = " ".join(fedpool(capsys, "recipe", "show", name).split())
    assert "https://arxiv.org/abs/2003.00295" in shown
    assert "w <- optimizer(w, -delta)" in shown
    assert (
        "server_lr, float or None, above 0, finite, default None: the server's learning rate; empty: 1 for momentum"
        in shown
    )
    assert "docs/recipes/fields.md" in shown
    assert "](" not in shown and "<!--" not in shown


@pytest.mark.parametrize("name", ["FedProxRecipe", "fedproxrecipe", "FEDPROX", "fed-prox"])
def test_a_page_is_found_by_any_spelling_of_its_name(name: str) -> None:
    assert find_page(name) == (ROOT / "docs/recipes/fedprox.md").read_text()


def test_show_says_which_fields_have_to_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(fedpool(capsys, "recipe", "show", "fields").split())
    assert "min_clients, int, from 1, required: accepted updates that a round needs" in shown


@pytest.mark.parametrize("width", ["60", "200"])
def test_show_leaves_nothing_out_in_a_terminal_of_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for name in built_in():
        assert "…" not in fedpool(capsys, "recipe", "show", name)


def test_an_unknown_recipe_ends_with_1_and_names_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recipe", "show", "fedsgd"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "there is no recipe 'fedsgd'" in error and all(
        name in error for name in (*built_in(), "fields, aggregators")
    )


def test_it_does_not_load_prefect() -> None:
    code = (
        "import sys\nfrom fedpool.cli import app\n"
        "app(['recipe', 'list'], result_action='return_value')\n"
        "app(['recipe', 'show', 'fedavg'], result_action='return_value')\n"
        "print('prefect' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "False"
