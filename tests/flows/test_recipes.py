"""The registry of recipes: fedpool's own, and those that installed packages register."""

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

import fedpool
from fedpool import FedAvgRecipe, IntegrityError, Recipe, RecipeError, Store, TrainingRecipe
from fedpool.flows import recipes
from fedpool.flows.deployed import deployed, entrypoint_of
from fedpool.flows.recipes import BUILT_IN, built_in, class_name, find_installed, full_type, type_of
from fedpool.flows.staging import check_unchanged, stage
from fedpool.flows.stored import recipe_of

SITES = ("site-1", "site-2")


def test_every_recipe_is_named_once_and_the_facade_has_it() -> None:
    assert sorted(map(class_name, BUILT_IN.values())) == recipes.__all__
    assert {name: getattr(fedpool, name) for name in recipes.__all__} == dict(built_in())
    assert {name for name in fedpool.__all__ if name.endswith("Recipe")} == {
        "Recipe",
        "TrainingRecipe",
        *recipes.__all__,
    }


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_recipe_of_fedpools_own_is_of_the_file_of_its_name_and_has_a_flow_of_that_name(name: str) -> None:
    kind = find_installed(BUILT_IN[name])
    assert kind is not None and type_of(kind) == BUILT_IN[name] and kind.__module__ == f"fedpool.flows.{name}"
    assert entrypoint_of(kind) == f"fedpool.flows.entrypoints.{name}"
    flow = import_object(entrypoint_of(kind))  # as Prefect does
    assert flow.name == "federated-job" and parameter_schema(flow) == parameter_schema(deployed(kind))


def test_the_name_of_a_class_alone_is_that_of_fedpools_own_and_nothing_elses() -> None:
    assert full_type("ScaffoldRecipe") == "fedpool.flows.scaffold:ScaffoldRecipe"
    assert full_type("other:ScaffoldRecipe") == "other:ScaffoldRecipe"
    assert full_type("PartialStepRecipe") == "PartialStepRecipe"


@pytest.mark.parametrize("name", ["fedavgg", "own", "own(", "own(a,)", "own(a;b)", "own(1a)", "__wrapped__"])
def test_there_is_no_other_flow(name: str) -> None:
    entrypoints = importlib.import_module("fedpool.flows.entrypoints")
    with pytest.raises(AttributeError, match=r"there is no flow fedpool\.flows\.entrypoints\..*: use fedavg, "):
        getattr(entrypoints, name)
    with pytest.raises(AttributeError, match="no attribute 'FedSecretRecipe'"):
        _ = recipes.FedSecretRecipe


def test_the_registry_loads_no_recipe() -> None:
    code = "import sys, fedpool.flows.recipes; print(sorted(m for m in sys.modules if m.startswith('fedpool')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert eval(found.stdout) == ["fedpool", "fedpool.flows", "fedpool.flows.recipes", "fedpool.startup"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type[TrainingRecipe]]:
    """Installs a package with a recipe, as pip would, and returns the recipe's class. The argument
    is the value of the package's entry point, or empty for none.
    """

    def install(entry_point: str) -> type[TrainingRecipe]:
        site = tmp_path / "site-packages"
        (site / "acme_fl").mkdir(parents=True)
        (site / "acme_fl" / "__init__.py").touch()
        (site / "acme_fl" / "halves.py").write_text(
            textwrap.dedent("""
                from fedpool import FedAvgRecipe

                class HalvesRecipe(FedAvgRecipe):
                    share: float = 0.5
            """)
        )
        about = site / "acme_fl-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-fl\nVersion: 1.0\n")
        if entry_point:
            (about / "entry_points.txt").write_text(f"[fedpool.recipes]\nhalves = {entry_point}\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "acme_fl", raising=False)
        monkeypatch.delitem(sys.modules, "acme_fl.halves", raising=False)
        kind: type[TrainingRecipe] = importlib.import_module("acme_fl.halves").HalvesRecipe
        return kind

    return install


def staged(kind: type[TrainingRecipe], script: Path, store: Store) -> Recipe:
    model = {"w": np.zeros(3, np.float32)}
    recipe = kind(name="job", min_clients=2, num_rounds=2, model=model, train_script=str(script))
    stage(recipe, "job-1", store, SITES)
    return recipe


def test_an_installed_recipe_that_is_registered_is_found_by_its_job(
    package: Callable[[str], type[TrainingRecipe]], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    kind, store = package("acme_fl.halves:HalvesRecipe"), Store(tmp_path / "store")
    recipe = staged(kind, write_script("pass"), store)
    described = store.read_json("job-1/job.json")
    assert described["recipe"]["type"] == "acme_fl.halves:HalvesRecipe" and "code" not in described
    again = recipe_of("job-1", store)
    assert type(again) is kind and again.model_dump(mode="json") == recipe.model_dump(mode="json")
    check_unchanged(again, "job-1", store, SITES)
    share = "aggregator,late,share"
    assert entrypoint_of(kind) == f"fedpool.flows.entrypoints.own({share})"
    flow = import_object(entrypoint_of(kind))
    assert set(parameter_schema(deployed(kind)).properties) == set(flow.fn.__signature__.parameters)


def test_a_class_of_the_same_name_and_fields_is_another_class(
    package: Callable[[str], type[TrainingRecipe]], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    kind, store = package("acme_fl.halves:HalvesRecipe"), Store(tmp_path / "store")
    other = type("FedAvgRecipe", (FedAvgRecipe,), {"__module__": kind.__module__})
    staged(other, write_script("pass"), store)
    with pytest.raises(RecipeError, match=r"has a acme_fl\.halves:FedAvgRecipe, not a fedpool\.flows\.fedavg:FedAvg"):
        recipe_of("job-1", store, FedAvgRecipe)
    with pytest.raises(IntegrityError, match=r"acme_fl\.halves:FedAvgRecipe"):
        recipe_of("job-1", store)


def test_a_field_with_the_name_of_a_parameter_of_every_deployment_is_refused() -> None:
    class TakenRecipe(FedAvgRecipe):
        store: str = ""

    with pytest.raises(RecipeError, match="TakenRecipe has a field 'store', which is the name of a parameter of every"):
        deployed(TakenRecipe)
