"""The recipe: frozen, described, and refused when it is built if anything is known to be wrong."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedpool import PocEnv, SimEnv
from fedpool.arrays import save_and_hash
from fedpool.environment import ANEW, Begin
from fedpool.errors import RecipeError
from fedpool.flows.fedavg import FedAvg, FedAvgRecipe
from fedpool.flows.fedprox import FedProxRecipe
from fedpool.flows.scaffold import ScaffoldRecipe
from fedpool.recipe import Recipe
from fedpool.store import to_json
from fedpool.tensors import Digest

INITIAL = Digest("0" * 64, 1)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "client.py"
    path.write_text("import helper\n")
    (tmp_path / "helper.py").write_text("import json\n")
    return path


@pytest.fixture
def fields(script: Path) -> dict[str, Any]:
    """The fields that every recipe needs."""
    return {
        "name": "hello",
        "model": {"body.w": np.zeros((2, 3), dtype=np.float32), "head.w": np.zeros(2, dtype=np.float32)},
        "train_script": script,
        "min_clients": 2,
        "num_rounds": 3,
    }


def refusal(fields: dict[str, Any], **changes: Any) -> str:
    """The message that refuses a recipe with these changes."""
    with pytest.raises(ValueError) as refused:  # the contract: a plain ValueError, whatever raised it
        FedAvgRecipe(**{**fields, **changes})
    return str(refused.value)


def test_the_least_recipe_has_the_documented_defaults(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields)
    assert recipe.train_args == ""
    assert recipe.clients_per_round is None
    assert recipe.initial_ckpt is None
    assert recipe.params_transfer_type == "FULL"
    assert recipe.aggregation_weights == {}
    assert recipe.exclude_vars == ()
    assert (recipe.key_metric, recipe.key_metric_mode) == ("accuracy", "max")
    assert recipe.stop_cond is None
    assert recipe.patience is None
    assert recipe.seed == 0
    assert recipe.per_site_config == {}
    assert recipe.round_timeout is None


def test_its_strategy_is_federated_averaging(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields)
    assert isinstance(recipe, Recipe)
    assert isinstance(recipe.strategy(2), FedAvg)


def test_a_recipe_is_frozen(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.num_rounds = 5  # type: ignore[misc]  # the mistake that is tested
    assert recipe.num_rounds == 3


def test_positional_arguments_are_refused() -> None:
    by_position: Any = FedAvgRecipe  # its type allows no such call
    with pytest.raises(
        RecipeError, match=r"takes its fields by name, got 'hello' without one: write FedAvgRecipe\(name="
    ):
        by_position("hello")


@pytest.mark.parametrize("missing", ["name", "model", "train_script", "min_clients", "num_rounds"])
def test_a_field_that_every_job_needs_must_be_given(missing: str, fields: dict[str, Any]) -> None:
    del fields[missing]
    words = refusal(fields)
    assert missing in words
    assert "required" in words.lower()


def test_an_unknown_field_is_refused_by_name(fields: dict[str, Any]) -> None:
    assert "num_round: did you mean num_rounds?" in refusal(fields, num_round=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_clients", 0), ("num_rounds", 0), ("num_rounds", 100_001), ("clients_per_round", 0), ("patience", 0), ("seed", -1),
        ("seed", 2**63), ("round_timeout", 0), ("round_timeout", -1.0), ("round_timeout", float("nan")),
        ("round_timeout", float("inf")), ("threads_per_site", 0), ("key_metric", ""), ("key_metric_mode", "best"),
        ("params_transfer_type", "HALF"), ("num_rounds", 2.5), ("num_rounds", "many"), ("train_args", 3),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_by_field(field: str, value: Any, fields: dict[str, Any]) -> None:
    assert field in refusal(fields, **{field: value})


@pytest.mark.parametrize("name", ["", "a/b", "../up", "hello world", ".hidden", "x" * 65])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str, fields: dict[str, Any]) -> None:
    assert "name" in refusal(fields, name=name)


def test_a_script_that_is_missing_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    words = refusal(fields, train_script=tmp_path / "nowhere.py")
    assert "train_script" in words
    assert "nowhere.py' is not a file" in words


def test_a_script_that_does_not_compile_is_refused(fields: dict[str, Any], script: Path) -> None:
    script.write_text("def train(:\n")
    assert "client.py does not compile" in refusal(fields)


def test_the_bundle_is_that_of_the_script_when_the_recipe_was_built(fields: dict[str, Any], script: Path) -> None:
    recipe = FedAvgRecipe(**fields)
    before = recipe.bundle.sha256
    script.write_text("print('changed since')\n")
    assert recipe.bundle.sha256 == before
    assert FedAvgRecipe(**fields).bundle.sha256 != before


def test_one_include_needs_no_list(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a")
    one, many = (FedAvgRecipe(**{**fields, "include": value}) for value in ("labels.txt", ["labels.txt"]))
    assert one.include == many.include == ("labels.txt",)
    assert one.bundle.sha256 == many.bundle.sha256 != FedAvgRecipe(**fields).bundle.sha256


@pytest.mark.parametrize(
    ("train_args", "arguments"),
    [
        ("", ()),
        ("--lr 0.1 --name 'two words'", ("--lr", "0.1", "--name", "two words")),
        (["--name", "two words", "it's"], ("--name", "two words", "it's")),
    ],
)
def test_train_args_are_split_as_a_shell_would_or_taken_from_a_list(
    train_args: Any, arguments: tuple[str, ...], fields: dict[str, Any]
) -> None:
    assert FedAvgRecipe(**{**fields, "train_args": train_args}).client_job("j", INITIAL).arguments == arguments


def test_unbalanced_quotes_in_train_args_are_refused(fields: dict[str, Any]) -> None:
    words = refusal(fields, train_args="--name 'two words")
    assert "train_args" in words
    assert "balance its quotes" in words


def test_min_clients_may_not_exceed_clients_per_round(fields: dict[str, Any]) -> None:
    assert "min_clients=2 is more than clients_per_round=1" in refusal(fields, clients_per_round=1)
    assert FedAvgRecipe(**{**fields, "clients_per_round": 2}).clients_per_round == 2


@pytest.mark.parametrize("kind", ["module", "torch", "numpy", "safetensors", "checkpoint"])
def test_the_model_may_come_in_every_documented_form(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 1)
    state = net.state_dict()
    safetensors, checkpoint = tmp_path / "m.safetensors", tmp_path / "m.pt"
    with safetensors.open("wb") as file:
        save_and_hash(file, state)
    torch.save(state, checkpoint)
    model = {
        "module": net,
        "torch": state,
        "numpy": {name: value.numpy() for name, value in state.items()},
        "safetensors": safetensors,
        "checkpoint": str(checkpoint),
    }[kind]
    recipe = FedAvgRecipe(**{**fields, "model": model})
    assert {name: str(entry) for name, entry in recipe.model.spec.items()} == {
        "weight": "F32 [1, 2]",
        "bias": "F32 [1]",
    }
    assert {name: value.tolist() for name, value in recipe.model.params.items()} == {
        name: value.tolist() for name, value in state.items()
    }


def test_a_model_of_no_known_form_is_refused(fields: dict[str, Any]) -> None:
    assert "model must be a torch.nn.Module" in refusal(fields, model=3)


def test_a_checkpoint_whose_keys_do_not_fit_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"body.w": torch.zeros(2, 3), "tail.w": torch.zeros(2)}, tmp_path / "c.pt")
    words = refusal(fields, initial_ckpt=tmp_path / "c.pt")
    assert "does not fit the model" in words
    assert "head.w is missing" in words
    assert "tail.w is not in the model" in words


def test_a_checkpoint_that_fits_gives_the_initial_values(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"body.w": torch.ones(2, 3), "head.w": torch.full((2,), 7.0)}, tmp_path / "c.pt")
    recipe = FedAvgRecipe(**{**fields, "initial_ckpt": str(tmp_path / "c.pt")})
    assert recipe.model.params["head.w"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("text", ["accuracy>=0.8", "accuracy >= 0.8", " accuracy  >=0.80"])
def test_a_stop_condition_parses_with_and_without_spaces(text: str, fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**{**fields, "stop_cond": text})
    assert recipe.stop_cond == "accuracy >= 0.8"
    assert recipe.stop_condition is not None
    assert recipe.stop_condition.holds({"accuracy": 0.8})


def test_a_stop_condition_keeps_every_digit_of_its_threshold(fields: dict[str, Any]) -> None:
    condition = FedAvgRecipe(**{**fields, "stop_cond": "loss <= 0.123456789"}).stop_condition
    assert condition is not None
    assert condition.threshold == 0.123456789


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"accuracy": (0, 1)}, {"accuracy": (0.0, 1.0)}),
        ({"loss": [0, None], "gap": [None, 2.5]}, {"loss": (0.0, None), "gap": (None, 2.5)}),
        ({"bias": (1, 1)}, {"bias": (1.0, 1.0)}),
        (None, {}),
    ],
)
def test_the_range_of_a_metric_may_be_open_at_one_end(given: Any, kept: Any, fields: dict[str, Any]) -> None:
    assert FedAvgRecipe(**fields, metric_ranges=given).metric_ranges == kept


@pytest.mark.parametrize("limits", [(None, None), (1, 0), (0, math.inf), (math.nan, 1)])
def test_a_range_that_says_nothing_is_refused_by_the_metrics_name(limits: Any, fields: dict[str, Any]) -> None:
    said = refusal(fields, metric_ranges={"accuracy": limits})
    assert "metric_ranges['accuracy'] must have a lowest and a highest value, one of which may be None, got" in said


def test_a_weight_has_a_limit_unless_an_earlier_version_wrote_the_job(fields: dict[str, Any]) -> None:
    assert FedAvgRecipe(**fields).max_weight == 1e12
    assert FedAvgRecipe(**fields, max_weight=5000).max_weight == 5000.0
    for limit in (0, -1, math.inf):
        assert "max_weight" in refusal(fields, max_weight=limit)
    assert FedAvgRecipe.recorded({})["max_weight"] == sys.float_info.max
    assert FedAvgRecipe.recorded({"max_weight": 7.0})["max_weight"] == 7.0


def test_a_stop_condition_that_does_not_parse_is_refused(fields: dict[str, Any]) -> None:
    assert "metric >= number" in refusal(fields, stop_cond="accuracy is good")


@pytest.mark.parametrize(
    ("metric", "condition", "mode"),
    [
        ("loss", "loss <= 0.1", "min"),
        ("loss", "loss < 0.1", "min"),
        ("accuracy", "accuracy >= 0.8", "max"),
        ("accuracy", "loss <= 0.1", "max"),  # about another metric: it says nothing
        ("accuracy", "accuracy == 1", "max"),
    ],
)
def test_the_mode_follows_the_condition(metric: str, condition: str, mode: str, fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields, key_metric=metric, stop_cond=condition)
    assert recipe.key_metric_mode == mode
    assert recipe.revise(num_rounds=9).key_metric_mode == mode


def test_a_mode_that_contradicts_the_condition_is_refused(fields: dict[str, Any]) -> None:
    contradiction = {"key_metric": "loss", "stop_cond": "loss <= 0.1", "key_metric_mode": "max"}
    words = refusal(fields, **contradiction)
    assert (
        "key_metric_mode='max' contradicts stop_cond='loss <= 0.1': give key_metric_mode='min', or leave it out"
        in words
    )
    assert FedAvgRecipe(**fields | contradiction | {"key_metric_mode": "min"}).key_metric_mode == "min"
    agreed = FedAvgRecipe(**fields | contradiction | {"stop_cond": "loss >= 0.1"})
    with pytest.raises(RecipeError, match="contradicts"):
        agreed.revise(stop_cond="loss <= 0.1")


def test_a_job_of_an_earlier_version_keeps_its_mode(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields)
    stored = dict(recipe) | {"key_metric": "loss", "stop_cond": "loss <= 0.1", "key_metric_mode": "max"}
    restored = FedAvgRecipe.restore(stored, recipe.bundle)
    assert restored.given is None and restored.key_metric_mode == "max"
    assert restored.revise(num_rounds=9).key_metric_mode == "max"


@pytest.mark.parametrize("metric", ["loss", "val_loss", "RMSE", "eval/error", "perplexity"])
def test_a_metric_that_sounds_as_if_less_is_better_asks_for_a_mode(metric: str, fields: dict[str, Any]) -> None:
    with pytest.warns(
        UserWarning, match=f'the highest {metric} counts as the best; give key_metric_mode="min"'
    ) as seen:
        recipe = FedAvgRecipe(**fields, key_metric=metric)
    assert recipe.key_metric_mode == "max"  # never changed silently
    assert seen[0].filename == __file__
    FedAvgRecipe(**fields, key_metric=metric, key_metric_mode="max")  # no warning


@pytest.mark.parametrize("metric", ["accuracy", "neg_log_loss", "-loss", "glossiness"])
def test_other_metrics_ask_for_none(metric: str, fields: dict[str, Any]) -> None:
    FedAvgRecipe(**fields, key_metric=metric)


def test_without_a_stop_condition_there_is_none(fields: dict[str, Any]) -> None:
    assert FedAvgRecipe(**fields).stop_condition is None


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"site-1": -1.0}, "finite number from 0"),
        ({"site-1": float("inf")}, "finite number from 0"),
        ({"site-1": float("nan")}, "finite number from 0"),
        ({"site-1": 0.0, "site-2": 0.0}, "all 0"),
        ({"../site": 1.0}, "cannot be part of a path"),
        ({"site-1": "heavy"}, "aggregation_weights"),
    ],
)
def test_aggregation_weights_that_cannot_work_are_refused(
    weights: dict[str, Any], words: str, fields: dict[str, Any]
) -> None:
    assert words in refusal(fields, aggregation_weights=weights)


def test_aggregation_weights_are_kept_and_none_means_none(fields: dict[str, Any]) -> None:
    assert FedAvgRecipe(**{**fields, "aggregation_weights": {"site-1": 0, "site-2": 2}}).aggregation_weights == {
        "site-1": 0.0,
        "site-2": 2.0,
    }
    assert FedAvgRecipe(**{**fields, "aggregation_weights": None}).aggregation_weights == {}


def test_one_pattern_of_excluded_vars_needs_no_list(fields: dict[str, Any]) -> None:
    assert FedAvgRecipe(**{**fields, "exclude_vars": "head"}).client_job("j", INITIAL).exclude == ("head",)
    assert FedAvgRecipe(**{**fields, "exclude_vars": None}).exclude_vars == ()


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ("(", "is not a regular expression"),
        ("tail", "matches no parameter: body.w, head.w"),
        ("w$", "leaves no parameter to train"),
    ],
)
def test_excluded_vars_that_cannot_work_are_refused(patterns: str, words: str, fields: dict[str, Any]) -> None:
    assert words in refusal(fields, exclude_vars=patterns)


def test_per_site_config_reaches_its_site_and_its_train_args_replace_the_command_line(fields: dict[str, Any]) -> None:
    config = {
        "site-1": {"data": "a.csv", "folds": [1, 2]},
        "site-2": {"train_args": "--lr 'two words'"},
        "site-3": {"train_args": ["x y"]},
    }
    job = FedAvgRecipe(**{**fields, "train_args": "--lr 1", "per_site_config": config}).client_job("j", INITIAL)
    assert job.site_config == {"site-1": {"data": "a.csv", "folds": [1, 2]}, "site-2": {}, "site-3": {}}
    assert job.arguments == ("--lr", "1")
    assert job.site_arguments == {"site-2": ("--lr", "two words"), "site-3": ("x y",)}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"site 1": {}}, "cannot be part of a path"),
        ({"site-1": {"train_args": 3}}, "must be a string or a list"),
        ({"site-1": {"train_args": "'"}}, "per_site_config['site-1']['train_args']"),
        ({"site-1": {"data": Path("a")}}, "per_site_config"),
        ({"site-1": 3}, "per_site_config"),
    ],
)
def test_per_site_config_that_cannot_work_is_refused(
    config: dict[str, Any], words: str, fields: dict[str, Any]
) -> None:
    assert words in refusal(fields, per_site_config=config)


def test_config_is_for_all_sites_and_a_sites_own_values_win_over_it(fields: dict[str, Any]) -> None:
    own = {"site-1": {"lr": 0.5}}
    common = {**fields, "config": {"lr": 0.1, "data": {"path": "/data"}}, "per_site_config": own}
    job = FedAvgRecipe(**common).client_job("j", INITIAL)
    assert job.config == {"lr": 0.1, "data": {"path": "/data"}}
    assert job.site_config == own
    assert FedProxRecipe(**common, fedprox_mu=0.1).client_job("j", INITIAL).config == {
        **job.config,
        "fedprox_mu": 0.1,
    }


def test_config_that_cannot_work_is_refused(fields: dict[str, Any]) -> None:
    assert "config holds NaN or infinity" in refusal(fields, config={"lr": float("inf")})
    assert "config['train_args'] would not be used as a command line: give the recipe train_args=..." in refusal(
        fields, config={"train_args": "--lr 1"}
    )
    assert "config" in refusal(fields, config={"data": Path("a")})
    for kind, name, remedy in (
        (FedProxRecipe, "fedprox_mu", "give the recipe fedprox_mu=..."),
        (ScaffoldRecipe, "algorithm", "give it another name"),
    ):
        more = {"fedprox_mu": 0.1} if kind is FedProxRecipe else {}
        with pytest.raises(ValueError, match=rf"config\['{name}'\] is set by the recipe's algorithm: {remedy}"):
            kind(**{**fields, **more, "config": {name: 1}})


def test_per_site_config_that_json_cannot_hold_is_refused_when_the_recipe_is_built(fields: dict[str, Any]) -> None:
    assert "per_site_config" in refusal(fields, per_site_config={"site-1": {"lr": float("nan")}})


def test_per_site_config_of_none_is_empty(fields: dict[str, Any]) -> None:
    assert FedAvgRecipe(**{**fields, "per_site_config": None}).per_site_config == {}


def test_what_the_sites_are_told_is_what_the_recipe_says(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**{**fields, "params_transfer_type": "DIFF", "seed": 7, "threads_per_site": 2})
    job = recipe.client_job("hello-1", INITIAL)
    assert (job.job_id, job.total_rounds, job.transfer, job.seed, job.threads) == ("hello-1", 3, "DIFF", 7, 2)
    assert (job.entry, job.bundle_sha256, job.imports) == ("client.py", recipe.bundle.sha256, ("json",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_clients": 4}, "min_clients=4, but the environment has 3 sites"),
        ({"clients_per_round": 4}, "clients_per_round=4, but the environment has 3 sites"),
        ({"aggregation_weights": {"site-9": 1.0}}, "aggregation_weights names site-9"),
        ({"per_site_config": {"site-9": {}}}, "per_site_config names site-9"),
    ],
)
def test_a_recipe_is_checked_against_the_sites_of_an_environment(
    changes: dict[str, Any], words: str, fields: dict[str, Any]
) -> None:
    recipe = FedAvgRecipe(**{**fields, **changes})
    with pytest.raises(RecipeError, match=words):
        recipe.check_sites(["site-1", "site-2", "site-3"])


def test_a_recipe_passes_where_its_sites_are_and_nowhere_else(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(
        **fields, aggregation_weights={"site-1": 2.0}, per_site_config={"site-2": {}}, clients_per_round=2
    )
    recipe.check_sites(["site-1", "site-2"])
    with pytest.raises(RecipeError):
        recipe.check_sites(["site-1"])


def test_the_fields_of_a_recipe_make_another_with_the_same_model(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields)
    longer = FedAvgRecipe(**{**dict(recipe), "num_rounds": 9})
    assert longer.num_rounds == 9
    assert longer.model is recipe.model
    assert longer.bundle == recipe.bundle


def test_execute_hands_the_recipe_to_the_environment(fields: dict[str, Any]) -> None:
    class Elsewhere:
        def execute(self, recipe: Recipe, begin: Begin = ANEW, *, wait: bool = True) -> tuple[Recipe, Begin, bool]:
            return recipe, begin, wait

    recipe = FedAvgRecipe(**fields)
    assert recipe.execute(Elsewhere()) == (recipe, ANEW, True)
    assert recipe.execute(env=Elsewhere(), wait=False) == (recipe, ANEW, False)
    forked = recipe.execute(Elsewhere(), resume="job-1", fork=True, from_round=2)
    assert forked == (recipe, Begin("job-1", fork=True, from_round=2), True)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (None, r"env=None is not an environment: give one, such as SimEnv\(num_clients=2\)"),
        ("sim", "env='sim' is not an environment"),
        (SimEnv, r"env is the class SimEnv: give an instance, SimEnv\(...\)"),
    ],
)
def test_what_is_not_an_environment_is_refused(fields: dict[str, Any], env: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        FedAvgRecipe(**fields).execute(env=env)


def test_an_environment_that_cannot_deploy_is_refused(fields: dict[str, Any]) -> None:
    env: Any = SimEnv(num_clients=2)
    with pytest.raises(RecipeError, match="env is a SimEnv, which cannot deploy: give a PocEnv or a ProdEnv"):
        FedAvgRecipe(**fields).deploy(env)
    env = PocEnv
    with pytest.raises(RecipeError, match="env is the class PocEnv: give an instance"):
        FedAvgRecipe(**fields).deploy(env)


def test_a_fork_needs_to_know_of_what(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**fields)
    with pytest.raises(RecipeError, match="fork and from_round need resume"):
        recipe.execute(SimEnv(), fork=True)
    with pytest.raises(RecipeError, match="from_round=2 without fork=True"):
        recipe.execute(SimEnv(), resume="job-1", from_round=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "nul"}, "name 'nul' is the name of a device on Windows"),
        ({"name": "con.x"}, "is the name of a device on Windows"),
        ({"name": "a."}, "name 'a.' ends with a dot"),
        ({"per_site_config": {"a": {}, "A": {}}}, "site 'a' and site 'A' differ only in case"),
        ({"aggregation_weights": {"a": 1}, "per_site_config": {"A": {}}}, "differ only in case"),
        ({"over_sample": 1}, "over_sample=1 without clients_per_round: set how many updates a round takes"),
        ({"over_sample": -1}, "over_sample"),
        ({"quorum_grace": -0.1}, "quorum_grace"),
        ({"quorum_grace": float("nan")}, "quorum_grace"),
        ({"round_retries": -1}, "round_retries"),
        ({"site_retries": -1}, "site_retries"),
    ],
)
def test_rules_of_a_round_that_cannot_be_are_refused(
    changes: dict[str, Any], words: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=words):
        FedAvgRecipe(**{**fields, **changes})


def test_over_sampling_needs_as_many_sites(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**{**fields, "min_clients": 1, "clients_per_round": 2, "over_sample": 1})
    assert recipe.sample_size == 3
    recipe.check_sites(["a", "b", "c"])
    with pytest.raises(
        RecipeError, match="clients_per_round=2 with over_sample=1 more, but the environment has 2 sites"
    ):
        recipe.check_sites(["a", "b"])


def test_a_recipe_written_as_json_holds_the_models_hash_and_not_its_values(fields: dict[str, Any]) -> None:
    recipe = FedAvgRecipe(**{**fields, "per_site_config": {"site-1": {"a": [1, None]}}, "round_timeout": 1.5})
    dumped = json.loads(to_json(recipe.model_dump(mode="json")))
    assert dumped["model"] == {"sha256": recipe.model.digest.sha256, "tensors": 2, "parameters": 8}
    assert dumped["train_script"] == str(fields["train_script"])
    assert dumped["round_timeout"] == 1.5


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_every_field_is_described_in_the_json_schema(mode: Any) -> None:
    schema = FedAvgRecipe.model_json_schema(mode=mode)
    assert set(schema["properties"]) == set(FedAvgRecipe.model_fields)
    assert [name for name, entry in schema["properties"].items() if len(entry.get("description", "")) < 10] == []
    assert schema["additionalProperties"] is False


def test_every_number_is_bounded_in_the_json_schema() -> None:
    unbounded = []
    for name, entry in FedAvgRecipe.model_json_schema()["properties"].items():
        for form in entry.get("anyOf", [entry]):
            if form.get("type") in ("integer", "number") and not {"minimum", "exclusiveMinimum"} & set(form):
                unbounded.append(name)
    assert unbounded == []
