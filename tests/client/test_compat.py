"""What scripts use from NVFlare besides the six lines: `ctx`, `config_file`, decorators, writers,
constants.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedpool.client as flare
from fedpool import FedProxRecipe, Run, ScaffoldRecipe
from fedpool.client import compat
from fedpool.client.api import Client
from fedpool.client.proximal import PTFedProxLoss
from fedpool.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
from fedpool.errors import ClientError
from tests.hosts import MemoryHost, OneSite

MODEL = {"w": np.array([1.0, 2.0], dtype=np.float32)}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MemoryHost]:
    """Makes this process a client of an in-memory host: `serve(tasks...)`."""

    def start(*tasks: str, config: Mapping[str, Any] | None = None) -> MemoryHost:
        host = OneSite(tmp_path, MODEL, tasks or ("train",), config)
        monkeypatch.setattr(flare, "_client", Client(host, "numpy"))
        return host

    return start


class TestTheContext:
    """Every function accepts what `init` returns."""

    def test_a_loop_with_ctx_everywhere_runs(self) -> None:
        code = """
import fedpool.client as flare
from fedpool.client.tracking import SummaryWriter

ctx = flare.init(rank="0")
writer = SummaryWriter(ctx)
while flare.is_running(ctx=ctx):
    model = flare.receive(ctx=ctx)
    assert flare.is_train(ctx) and not flare.is_evaluate(ctx) and not flare.is_submit_model(ctx)
    names = flare.get_site_name(ctx), flare.get_job_id(ctx), flare.get_task_name(ctx), flare.system_info(ctx)["site_name"]
    assert flare.get_config(ctx) == {}
    flare.log("a", 1.5, flare.AnalyticsDataType.SCALAR, ctx=ctx)
    writer.add_scalar("b", 2.5)
    flare.send(flare.FLModel(metrics={"c": 3.5}), ctx=ctx)
flare.shutdown(ctx=ctx)
print(names)
"""
        ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=400)
        assert ran.returncode == 0, ran.stderr
        assert "fedpool: log a = 1.5\nfedpool: log b = 2.5\n" in ran.stdout
        assert ran.stdout.endswith("('site-1', 'standalone', 'train', 'site-1')\n")

    def test_something_else_is_refused_by_name(self, serve: Callable[..., MemoryHost]) -> None:
        serve()
        with pytest.raises(ClientError, match=r"ctx must be the value that flare\.init\(\) returned, got str"):
            flare.is_running(ctx="mine")  # type: ignore[arg-type]  # the mistake that is tested

    def test_a_config_file_is_not_read_and_a_warning_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flare, "_client", None)
        with pytest.warns(
            UserWarning, match=r"init\(\) does not read config_file='client.json': the recipe and the site"
        ):
            assert flare.init(config_file="client.json") is flare._client

    def test_a_second_init_returns_the_same(self, serve: Callable[..., MemoryHost]) -> None:
        serve()
        with pytest.warns(UserWarning, match="already called"):
            assert flare.init() is flare._client


class TestDecorators:
    """`@flare.train` and `@flare.evaluate`."""

    def test_what_evaluate_returns_goes_with_what_train_returns(self, serve: Callable[..., MemoryHost]) -> None:
        host = serve("train", "train")

        @flare.evaluate
        def score(model: Any = None) -> dict[str, float]:
            return {"first": float(model.params["w"][0])}

        @flare.train
        def step(model: Any, by: float, *, times: int = 1) -> flare.FLModel:
            return flare.FLModel(params={"w": model.params["w"] + np.float32(by * times)})

        while flare.is_running():
            score(None)
            step(None, 2.0, times=3)
        assert [update["metrics"] for update in host.updates] == [{"first": 1.0}, {"first": 7.0}]
        assert host.params_sent(1, "numpy")["w"].tolist() == [13.0, 14.0]

    def test_in_an_evaluate_round_the_score_is_sent_at_once(self, serve: Callable[..., MemoryHost]) -> None:
        host = serve("evaluate")

        @flare.evaluate()
        def score(model: Any) -> float:
            return float(model.params["w"].sum())

        flare.receive()
        assert score(None) == 3.0
        assert host.updates[0]["metrics"] == {"score": 3.0}

    @pytest.mark.parametrize("kind", ["train", "evaluate"])
    def test_a_function_that_returns_nothing_is_an_error(self, kind: str, serve: Callable[..., MemoryHost]) -> None:
        serve()

        def forgetful(model: Any) -> None:
            """Returns nothing."""

        with pytest.raises(ClientError, match=r"forgetful\(\) must return"):
            getattr(flare, kind)(forgetful)(None)

    def test_a_function_without_a_parameter_is_an_error(self, serve: Callable[..., MemoryHost]) -> None:
        serve()
        with pytest.raises(ClientError, match="needs a first parameter for the received model"):
            flare.train(lambda: None)()


class TestLogging:
    """All writers log to the same place."""

    def test_numbers_are_sent_and_texts_are_written_to_the_log(self, serve: Callable[..., MemoryHost]) -> None:
        host = serve()
        board, mlflow, wandb = SummaryWriter(), MLflowWriter(), WandBWriter()
        board.add_scalar("a", 1, 10)
        board.add_scalars("b", {"x": 2, "y": 3}, global_step=11)
        board.flush()
        board.close()
        wandb.log({"c": 4}, step=12)
        mlflow.log_metric("d", 5)
        mlflow.log_metrics({"e": np.float32(6)}, step=13)
        mlflow.log_param("lr", 0.1)
        mlflow.log_params({"depth": 3, "name": "net"})
        mlflow.log_text("two words", "notes/words.txt")
        mlflow.set_tag("owner", "me")
        mlflow.set_tags({"team": "us"})
        assert [(message["key"], message["value"], message["where"]) for message in host.sent] == [
            ("a", 1.0, {"global_step": "10"}),
            ("b/x", 2.0, {"global_step": "11"}),
            ("b/y", 3.0, {"global_step": "11"}),
            ("c", 4.0, {"global_step": "12"}),
            ("d", 5.0, {}),
            ("e", 6.0, {"global_step": "13"}),
        ]
        assert host.notes == [
            "lr = 0.1", "depth = 3", "name = net", "notes/words.txt = two words", "owner = me", "team = us",
        ]  # fmt: skip

    def test_what_cannot_be_logged_is_an_error_that_names_it(self, serve: Callable[..., MemoryHost]) -> None:
        serve()
        with pytest.raises(ClientError, match=r"log\('picture'\) of IMAGE is not possible:"):
            flare.log("picture", b"", flare.AnalyticsDataType.IMAGE)
        with pytest.raises(ClientError, match=r"log\('many'\) of METRICS takes a dict, got float: 1\.0"):
            flare.log("many", 1.0, flare.AnalyticsDataType.METRICS)

    def test_in_a_job_numbers_are_in_the_record_and_texts_in_the_log(self, run_job: Callable[..., Run]) -> None:
        run = run_job(
            """
            import fedpool.client as flare
            from fedpool.client.tracking import MLflowWriter

            flare.init()
            writer = MLflowWriter()
            while flare.is_running():
                model = flare.receive()
                writer.log_metrics({"loss": 0.25}, step=1)
                writer.set_tag("owner", "me")
                flare.send(flare.FLModel(params=model.params))
            """
        )
        assert run.get_result().rounds[0]["logged"] == {"loss": 0.25}
        assert "owner" in (Path(run.path) / "logs" / "site-1.log").read_text()


class TestConstants:
    """Names and values that scripts use as keys."""

    def test_the_meta_key_of_the_weight_is_the_one_that_is_read(self) -> None:
        assert (
            compat.FLMetaKey.NUM_STEPS_CURRENT_ROUND
            == compat.MetaKey.NUM_STEPS_CURRENT_ROUND
            == "NUM_STEPS_CURRENT_ROUND"
        )

    def test_the_models_are_the_clients_own(self) -> None:
        assert compat.FLModel is flare.FLModel
        assert compat.ParamsType is flare.ParamsType

    def test_fedprox_mu_is_the_recipes(self, run_job: Callable[..., Run]) -> None:
        run = run_job(
            """
            import fedpool.client as flare
            from fedpool.client.compat import get_fedprox_mu

            flare.init()
            while flare.is_running():
                model = flare.receive()
                flare.send(flare.FLModel(params=model.params, metrics={"mu": get_fedprox_mu(model)}))
            """,
            kind=FedProxRecipe,
            fedprox_mu=0.25,
        )
        assert run.get_result().metrics[0] == {"mu": 0.25}

    def test_no_fedprox_mu_is_an_error_that_names_the_recipe(self, serve: Callable[..., MemoryHost]) -> None:
        serve()
        model = flare.receive()
        assert model is not None
        with pytest.raises(ClientError, match="fedprox_mu must be a positive number, got None: use a FedProxRecipe"):
            compat.get_fedprox_mu(model)


SCAFFOLD_LOOP = """
import copy

import torch

import fedpool.client as flare
from fedpool.client.compat import AlgorithmConstants
from fedpool.client.scaffold_helper import PTScaffoldHelper, get_lr_values

model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
flare.init()
shift = float(flare.get_site_name()[-1])
inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(int(shift)))
helper = PTScaffoldHelper()
helper.init(model)
while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={}))
        continue
    before = copy.deepcopy(model)
    helper.load_global_controls(received.meta[AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL])
    c_global, c_local = helper.get_params()
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs) - shift).square().mean().backward()
        optimizer.step()
        lr = get_lr_values(optimizer)[0]
        helper.model_update(model, lr, c_global, c_local)
    helper.terms_update(model, lr, c_global, c_local, before)
    change = helper.get_delta_controls()
    flare.send(flare.FLModel(params=model.state_dict(), meta={AlgorithmConstants.SCAFFOLD_CTRL_DIFF: change}))
"""

OUR_LOOP = """
import torch

import fedpool.client as flare

model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
flare.init()
shift = float(flare.get_site_name()[-1])
inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(int(shift)))
while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={}))
        continue
    scaffold = flare.Scaffold(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs) - shift).square().mean().backward()
        optimizer.step()
    flare.send(flare.FLModel(params=model.state_dict(), extras=scaffold.extras()))
"""


def test_nvflares_scaffold_helper_comes_to_what_ours_does(run_job: Callable[..., Run]) -> None:
    model = torch.nn.Linear(3, 1)
    theirs = run_job(SCAFFOLD_LOOP, kind=ScaffoldRecipe, model=model, num_rounds=3).get_result()
    ours = run_job(OUR_LOOP, kind=ScaffoldRecipe, model=model, num_rounds=3).get_result()
    assert not torch.equal(torch.as_tensor(ours.params["weight"]), model.weight)
    for name, value in ours.params.items():
        assert torch.allclose(torch.as_tensor(theirs.params[name]), torch.as_tensor(value), atol=1e-5)


def test_nvflares_fedprox_loss_is_the_term_of_the_paper() -> None:
    model, received = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    expected = 0.15 * sum(
        (a - b).square().sum() for a, b in zip(model.parameters(), received.parameters(), strict=True)
    )
    assert torch.allclose(PTFedProxLoss(mu=0.3)(model, received), torch.as_tensor(expected))
    with pytest.raises(ClientError, match=r"mu must be a number from 0, got -1"):
        PTFedProxLoss(mu=-1)
