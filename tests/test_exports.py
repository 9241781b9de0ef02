"""The public names that `fedpool` and `fedpool.client` export: changing them must be a decision."""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

import fedpool
import fedpool.client
from fedpool.flows.recipes import BUILT_IN

FACADE = [
    "Aggregator",
    "Bulyan",
    "ClientError",
    "ConfigError",
    "CrossSiteEvalRecipe",
    "CyclicRecipe",
    "DiLoCoRecipe",
    "DittoRecipe",
    "ElementwiseFilter",
    "FLModel",
    "FedAvgRecipe",
    "FedBNRecipe",
    "FedEvalRecipe",
    "FedNovaRecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "FedpoolError",
    "Filter",
    "FilterContext",
    "FilterError",
    "GeometricMedian",
    "IntegrityError",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobStatus",
    "Krum",
    "Mean",
    "Median",
    "MultiKrum",
    "NormClippedMean",
    "ParamsType",
    "PocEnv",
    "ProdEnv",
    "Recipe",
    "RecipeError",
    "Result",
    "RoundError",
    "Run",
    "ScaffoldRecipe",
    "ServerError",
    "SimEnv",
    "SiteError",
    "State",
    "Store",
    "StoreError",
    "Strategy",
    "Tensors",
    "TrainingRecipe",
    "TrimmedMean",
    "Update",
    "weighted_mean",
]

CLIENT = [
    "AnalyticsDataType",
    "FLModel",
    "LocalSteps",
    "ParamsType",
    "Scaffold",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "keep",
    "kept",
    "log",
    "prox_loss",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

WITHOUT_PREFECT = [
    "fedpool.store",
    "fedpool.recipe",
    *(f"fedpool.tasks.{name}" for name in ("strategy", "gate", "record", "job_record", "ledger", "aggregate")),
    *(f"fedpool.flows.{name}" for name in ("recipes", "plan", "choose", "expected", "staging", "stored")),
    *(path.partition(":")[0] for path in BUILT_IN.values()),
    "fedpool.flows.verify",
    "fedpool.flows.replay",
    *(f"fedpool.sites.{name}" for name in ("desk", "piece", "service")),
    "fedpool.tasks.prefect_internals",
]
"""Modules that an environment needs before anything runs, and those of commands that read a store:
importing Prefect takes two seconds.
"""


def test_the_facade_exports_these_names_and_no_other() -> None:
    assert fedpool.__all__ == FACADE


def test_the_client_exports_these_names_and_no_other() -> None:
    assert fedpool.client.__all__ == CLIENT


@pytest.mark.parametrize(("module", "names"), [("fedpool", FACADE), ("fedpool.client", CLIENT)])
def test_every_name_resolves_to_something_of_that_name(module: str, names: list[str]) -> None:
    for name in names:
        assert getattr(importlib.import_module(module), name).__name__ == name


@pytest.mark.parametrize("name", ["FLModel", "ParamsType"])
def test_the_facade_and_the_client_speak_of_the_same_model(name: str) -> None:
    assert getattr(fedpool, name) is getattr(fedpool.client, name)


def test_dir_lists_the_public_names() -> None:
    assert dir(fedpool) == sorted(FACADE)
    assert set(CLIENT) <= set(dir(fedpool.client))


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'fedpool' has no attribute 'FedAvgRecipy'"):
        fedpool.FedAvgRecipy  # noqa: B018  # the access is what is tested
    assert not hasattr(fedpool, "_HOMELESS")


def test_an_unknown_name_cannot_be_imported() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from fedpool import Nothing")  # noqa: S102  # an import that fails cannot be written at the top


def test_a_name_is_loaded_when_it_is_first_used() -> None:
    code = (
        "import sys, fedpool\n"
        "print('prefect' in sys.modules, 'torch' in sys.modules)\n"
        "fedpool.FLModel, fedpool.SiteError\n"
        "print('prefect' in sys.modules, 'torch' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"] * 4


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("fedpool.cli", ("torch", "numpy", "prefect")),
        ("fedpool.deployments.site_worker", ("torch", "numpy")),
    ],
)
def test_a_command_and_a_worker_load_no_framework_that_they_do_not_use(module: str, unused: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {unused!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_what_reads_a_job_and_what_an_algorithm_is_made_of_costs_no_prefect() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'prefect' in sys.modules:\n"
        "        sys.exit(f'{name} loads Prefect')\n"
    )
    found = subprocess.run([sys.executable, "-c", code, *WITHOUT_PREFECT], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in FACADE if name.endswith(("Error", "Failed", "Cancelled"))])
def test_every_error_is_caught_by_catching_the_root(name: str) -> None:
    assert issubclass(getattr(fedpool, name), fedpool.FedpoolError)


def test_what_an_algorithm_of_the_users_is_written_against_stays_as_it_is() -> None:
    def fields(kind: type) -> list[str]:
        return [field.name for field in dataclasses.fields(kind)]

    def methods(kind: type) -> dict[str, str]:
        return {
            name: "property" if isinstance(value, property) else ", ".join(inspect.signature(value).parameters)
            for name, value in vars(kind).items()
            if not name.startswith("_") and (callable(value) or isinstance(value, property))
        }

    assert fields(fedpool.State) == ["params", "slots", "round", "averaged", "shares"]
    assert fields(fedpool.Update) == ["site", "weight", "params", "extras", "meta", "scale", "staleness"]
    assert methods(fedpool.State) == {"after": "self, params, slots"}
    assert methods(fedpool.Strategy) == {
        "slots": "property",
        "surveys": "property",
        "init": "self, params, averaged",
        "choose": "self, seed, round, sites, count",
        "survey": "self, geometry",
        "apply": "self, state, updates",
    }
    assert (fedpool.Strategy.extras, fedpool.Strategy.positive_meta, fedpool.Strategy.shared) == ((), (), False)
    assert methods(fedpool.Aggregator) == {
        "fewest": "property",
        "survey": "self, geometry",
        "combine": "self, name, state, updates",
        "check": "self, num_updates",
    }
    assert list(inspect.signature(fedpool.weighted_mean).parameters) == ["values"]
    assert inspect.signature(fedpool.Recipe.strategy).parameters.keys() == {"self", "num_sites"}
    assert {"client_config", "starts_own_models"} <= {
        name for name, value in vars(fedpool.Recipe).items() if isinstance(value, property)
    }
    common = [
        "name",
        "model",
        "train_script",
        "train_args",
        "min_clients",
        "initial_ckpt",
        "filters",
        "key_metric",
        "key_metric_mode",
        "metric_ranges",
        "max_weight",
        "seed",
        "config",
        "per_site_config",
        "round_timeout",
        "quorum_grace",
        "round_retries",
        "site_retries",
        "site_patience_s",
        "include",
        "threads_per_site",
    ]
    assert list(fedpool.Recipe.model_fields) == common
    assert list(fedpool.TrainingRecipe.model_fields) == [
        *common,
        "num_rounds",
        "clients_per_round",
        "over_sample",
        "params_transfer_type",
        "aggregation_weights",
        "exclude_vars",
        "stop_cond",
        "patience",
        "max_update_norm",
        "clip_updates",
        "max_rejections",
        "keep_updates",
        "final_evaluation",
        "cross_site_eval",
    ]
