"""`FLModel.meta`: the keys that NVFlare's scripts read, and what a script may send back in it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool.arrays import ParamsFormat
from fedpool.client.api import Client
from fedpool.client.hosts import Assignment, Welcome
from fedpool.errors import ClientError
from fedpool.model import FLModel
from tests.hosts import MemoryHost, host_of

MODEL = {
    "layer.weight": np.array([[1.0, 2.0]], dtype=np.float32),
    "norm.running_mean": np.array([5.0], dtype=np.float32),
    "norm.num_batches_tracked": np.array(3),
}


def received(host: MemoryHost, params_format: ParamsFormat = "numpy", **config: Any) -> tuple[Client, FLModel]:
    host.welcome = Welcome("job-1", "site-1", config)
    client = Client(host, params_format)
    model = client.receive()
    assert model is not None
    return client, model


@pytest.mark.parametrize("task", ["train", "evaluate", "submit_model"])
def test_who_where_and_when_stands_in_it_in_every_task(task: str, tmp_path: Path) -> None:
    _, model = received(host_of(tmp_path, MODEL, task=task))
    of_task = {"evaluate": {"validate_type": "model_validate"}, "submit_model": {"submit_model_name": "best_model"}}
    assert model.meta == {
        "job_id": "job-1",
        "site_name": "site-1",
        "start_round": 0,
        "current_round": 0,
        "total_rounds": 1,
        **of_task.get(task, {}),
    }


def test_the_mu_of_fedprox_stands_in_it_where_the_config_has_one(tmp_path: Path) -> None:
    _, model = received(host_of(tmp_path, MODEL), fedprox_mu=0.1)
    assert model.meta["fedprox_mu"] == 0.1


@pytest.mark.parametrize("params_format", ["torch", "numpy"])
def test_the_controls_of_scaffold_stand_in_it_for_every_parameter(params_format: ParamsFormat, tmp_path: Path) -> None:
    host = host_of(tmp_path, MODEL, MODEL, {"control::layer.weight": np.array([[0.5, -1.0]], dtype=np.float32)})
    first, second, extras = host.plan
    assert first and second and extras
    host.plan = [first, Assignment(**{**_fields(second), "extras": extras.model})]
    client, model = received(host, params_format, algorithm="scaffold")
    kind = torch.Tensor if params_format == "torch" else np.ndarray
    controls = model.meta["scaffold_c_global"]
    assert all(isinstance(value, kind) for value in controls.values())
    assert {name: value.tolist() for name, value in controls.items()} == {
        "layer.weight": [[0.0, 0.0]],
        "norm.running_mean": [0.0],
        "norm.num_batches_tracked": 0,
    }
    client.send(FLModel(params=model.params))
    model = client.receive()  # type: ignore[assignment]
    assert model.meta["scaffold_c_global"]["layer.weight"].tolist() == [[0.5, -1.0]]
    assert model.meta["scaffold_c_global"]["norm.running_mean"].tolist() == [0.0]


def _fields(assignment: Assignment) -> dict[str, Any]:
    return {name: getattr(assignment, name) for name in assignment.__slots__}


@pytest.mark.parametrize("params_format", ["torch", "numpy"])
def test_a_difference_of_controls_sent_in_it_goes_beside_the_parameters(
    params_format: ParamsFormat, tmp_path: Path
) -> None:
    host = host_of(tmp_path, {**MODEL, "head.weight": np.ones(2, dtype=np.float32)})
    client, model = received(host, params_format, algorithm="scaffold")
    assert model.params is not None
    changes = {name: value * 0 + 2 for name, value in model.params.items() if name != "head.weight"}
    client.send(FLModel(params=model.params, meta={**model.meta, "scaffold_c_diff": changes}))
    sent = {name: value.tolist() for name, value in host.params_sent().items() if name.startswith("control::")}
    # buffers have no control, and the control of a parameter that the script left out has not
    # changed
    assert sent == {"control::layer.weight": [[2.0, 2.0]], "control::head.weight": [0.0, 0.0]}
    assert "scaffold_c_diff" not in host.updates[0]["meta"]
    assert "scaffold_c_global" not in host.updates[0]["meta"]


@pytest.mark.parametrize("value", [10**400, float("inf")])
def test_a_number_that_json_or_a_float_cannot_hold_is_sent_as_a_word(value: float, tmp_path: Path) -> None:
    host = host_of(tmp_path, MODEL)
    client, model = received(host)
    client.send(FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": value, "low": -value, "id": 10**50}))
    assert host.updates[0]["meta"] == {"NUM_STEPS_CURRENT_ROUND": "inf", "low": "-inf", "id": 10**50}


@pytest.mark.parametrize("what", ["metrics", "meta"])
def test_too_many_values_or_too_long_a_name_are_refused_in_the_script(what: str, tmp_path: Path) -> None:
    many = dict.fromkeys(map(str, range(1001)), 1.0)
    for values, words in ((many, "it has 1001 entries, but at most 1000"), ({"x" * 251: 1.0}, "has 251 characters")):
        client, model = received(host_of(tmp_path, MODEL))
        fields: dict[str, Any] = {what: values}
        with pytest.raises(ClientError, match=f"{what} cannot be sent: .*{words}.*log others with flare.log"):
            client.send(FLModel(model.params_type, model.params, **fields))


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        ("scaffold", {"other": np.ones(1)}, r"names 'other', which is not among the params: layer\.weight"),
        ("scaffold", 3, "must be a dict of name -> array, got int"),
        ("", {}, "is for SCAFFOLD, but this job has another recipe: use ScaffoldRecipe"),
    ],
)
def test_controls_that_cannot_be_sent_are_refused(algorithm: str, changes: Any, words: str, tmp_path: Path) -> None:
    client, model = received(host_of(tmp_path, MODEL), algorithm=algorithm)
    with pytest.raises(ClientError, match=words):
        client.send(FLModel(params=model.params, meta={"scaffold_c_diff": changes}))


@pytest.mark.parametrize("task", ["train", "evaluate", "submit_model"])
def test_what_was_received_may_be_sent_back(task: str, tmp_path: Path) -> None:
    host = host_of(tmp_path, MODEL, task=task)
    client, model = received(host, algorithm="scaffold", fedprox_mu=0.5)
    model.metrics = {"accuracy": 1.0}
    client.send(model)
    assert host.updates[0]["meta"]["fedprox_mu"] == 0.5


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), "ten", True, None])
def test_a_number_of_examples_that_is_none_is_refused_at_once(count: Any, tmp_path: Path) -> None:
    client, _ = received(host_of(tmp_path, MODEL, task="evaluate"))
    with pytest.raises(ClientError, match=r"meta\['NUM_EVAL_EXAMPLES'\] must be a finite number from 0"):
        client.send(FLModel(metrics={"a": 1}, meta={"NUM_EVAL_EXAMPLES": count}))


def test_rounds_after_the_training_do_not_count_beyond_it(tmp_path: Path) -> None:
    """In a job of two training rounds and its evaluations, and in a job that trains nothing."""
    for round, total, seen in ((1, 2, (1, 2)), (2, 2, (1, 2)), (5, 2, (1, 2)), (0, 0, (0, 1)), (3, 0, (0, 1))):
        _, model = received(MemoryHost(tmp_path, [Assignment(round, total, task="evaluate")]))
        assert (model.current_round, model.total_rounds) == seen
        assert (model.meta["current_round"], model.meta["total_rounds"]) == seen


def test_parameters_sent_in_an_evaluation_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client, model = received(host_of(tmp_path, MODEL, MODEL, task="evaluate"))
    client.send(FLModel(params=model.params, metrics={"a": 1}))
    told = capsys.readouterr().err
    assert told.startswith("fedpool: round 0 at site-1 is an evaluation, so the parameters that were sent are ignored:")
    assert "is_evaluate()" in told and "final_evaluation=False" in told
    client.receive()
    client.send(FLModel(params=model.params, metrics={"a": 1}))
    assert capsys.readouterr().err == ""


def test_metrics_alone_are_no_matter_in_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client, _ = received(host_of(tmp_path, MODEL, task="evaluate"))
    client.send(FLModel(metrics={"a": 1}))
    assert capsys.readouterr().err == ""
