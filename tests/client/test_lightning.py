"""Lightning's Trainer as a client: what `fit` and `validate` do in a round, against in-memory hosts
and in whole jobs.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedpool.client
import fedpool.client.lightning as flare
from fedpool import FedNovaRecipe, JobFailed, Recipe, Run, ScaffoldRecipe
from fedpool.arrays import save_and_hash
from fedpool.client.api import Client
from fedpool.client.hosts import Standalone
from fedpool.client.link import ADDRESS_VARIABLE, KEY_VARIABLE
from fedpool.client.loading import fitting_params
from fedpool.client.proximal import add_proximal_gradient, proximal_mu
from fedpool.errors import ClientError
from tests.client.test_torchrun import SessionThread
from tests.hosts import MemoryHost, OneSite

pytestmark = [
    # Lightning's advice for a one-second training: more workers, fewer log lines.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Calls in Lightning that torch has deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning:(lightning|pytorch_lightning|torch).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(lightning|pytorch_lightning|torch).*"),
]

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
BATCHES = 5
EPOCHS = 2

generator = torch.Generator().manual_seed(0)
INPUTS = torch.randn(BATCHES * 4, 3, generator=generator)
TARGETS = torch.randn(BATCHES * 4, 1, generator=generator)
INITIAL = {"layer.weight": torch.tensor([[0.5, -0.25, 1.0]]), "layer.bias": torch.tensor([0.125])}


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, shuffle=True)


def to_score() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4)


def new_optimizer(module: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)


def lightning_net(package: ModuleType) -> Any:
    """A module of that package with the parameters of `Net`; it records what `configure_optimizers`
    sees.
    """

    class LightningNet(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.seen: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            inputs, targets = batch
            return nn.functional.mse_loss(self.layer(inputs), targets)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            inputs, targets = batch
            self.log("val_loss", nn.functional.mse_loss(self.layer(inputs), targets))
            self.log("bias", self.layer.bias.detach()[0])

        def configure_optimizers(self) -> Any:
            self.seen.append(self.trainer.estimated_stepping_batches)
            optimizer, scheduler = new_optimizer(self)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return LightningNet()


def new_trainer(package: ModuleType, folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if "callbacks" not in options:
        quiet["enable_checkpointing"] = False
    return package.Trainer(**{"max_epochs": EPOCHS, "default_root_dir": folder, **quiet, **options})


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the two packages that provide Lightning."""
    return importlib.import_module(request.param)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MemoryHost]:
    """Makes this process a client of an in-memory host: `serve(tasks, model=..., config=...)`."""

    def start(
        tasks: Sequence[str] = ("train",),
        model: Mapping[str, Any] = INITIAL,
        config: Mapping[str, Any] | None = None,
    ) -> MemoryHost:
        host = OneSite(tmp_path, model, tasks, config)
        monkeypatch.setattr(fedpool.client, "_client", Client(host))
        return host

    return start


def plain_loop(num_rounds: int, *, restore_state: bool = True, mu: float = 0.0) -> dict[str, torch.Tensor]:
    """The oracle: the result of a script with its own training loop."""
    net = Net()
    net.load_state_dict(INITIAL)
    optimizer, scheduler = new_optimizer(net)
    for number in range(num_rounds):
        torch.manual_seed(number)
        received = [parameter.detach().clone() for parameter in net.parameters()]
        if not restore_state:
            optimizer, scheduler = new_optimizer(net)
        for _ in range(EPOCHS):
            for inputs, targets in loader():
                optimizer.zero_grad()
                nn.functional.mse_loss(net.layer(inputs), targets).backward()  # type: ignore[no-untyped-call]
                for parameter, anchor in zip(net.parameters(), received, strict=True):
                    assert parameter.grad is not None
                    parameter.grad += mu * (parameter.detach() - anchor)
                optimizer.step()
            scheduler.step()
    return net.state_dict()


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class TestTraining:
    """What a round trains, and what it sends."""

    @pytest.mark.parametrize("validates", [False, True], ids=["fit", "validate and fit"])
    @pytest.mark.parametrize("restore_state", [False, True], ids=["fresh state", "kept state"])
    def test_three_rounds_give_the_bits_of_a_plain_loop(
        self,
        package: ModuleType,
        serve: Callable[..., MemoryHost],
        tmp_path: Path,
        restore_state: bool,
        validates: bool,
    ) -> None:
        host = serve(["train"] * 3)
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer, restore_state=restore_state)
        net = lightning_net(package)
        while flare.is_running():
            if validates:
                trainer.validate(net, to_score(), verbose=False)
            trainer.fit(net, loader())
        assert same_bits(host.params_sent(2), plain_loop(3, restore_state=restore_state))
        assert not same_bits(host.params_sent(2), plain_loop(3, restore_state=not restore_state))

    def test_fedprox_pulls_towards_the_received_model_as_a_plain_loop_would(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 2, config={"fedprox_mu": 0.5})
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        while flare.is_running():
            trainer.fit(net, loader())
        assert same_bits(host.params_sent(1), plain_loop(2, mu=0.5))
        assert not same_bits(host.params_sent(1), plain_loop(2))

    @pytest.mark.parametrize(
        ("options", "steps", "seen"),
        [({}, EPOCHS * BATCHES, EPOCHS * BATCHES), ({"max_epochs": -1, "max_steps": 3}, 3, 3)],
        ids=["max_epochs", "max_steps"],
    )
    def test_limits_count_per_round_and_the_steps_are_the_weight(
        self,
        package: ModuleType,
        serve: Callable[..., MemoryHost],
        tmp_path: Path,
        options: dict[str, Any],
        steps: int,
        seen: int,
    ) -> None:
        host = serve(["train"] * 3)
        trainer = new_trainer(package, tmp_path, **options)
        flare.patch(trainer)
        net = lightning_net(package)
        while flare.is_running():
            trainer.fit(net, loader())
        assert [update["meta"]["NUM_STEPS_CURRENT_ROUND"] for update in host.updates] == [steps] * 3
        assert trainer.global_step == 3 * steps
        assert net.seen == [seen] * 3  # a schedule made for a round is equally long in each

    def test_gradient_accumulation_counts_the_optimizers_steps(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve()
        package = importlib.import_module(PACKAGES[0])
        trainer = new_trainer(package, tmp_path, max_epochs=1, accumulate_grad_batches=BATCHES)
        flare.patch(trainer)
        trainer.fit(lightning_net(package), loader())
        assert host.updates[0]["meta"] == {"NUM_STEPS_CURRENT_ROUND": 1}

    @pytest.mark.parametrize("restore_state", [True, False])
    def test_a_grad_scaler_lives_as_long_as_the_optimizers_do(
        self, serve: Callable[..., MemoryHost], tmp_path: Path, restore_state: bool
    ) -> None:
        serve(["train"] * 2)
        package = importlib.import_module(PACKAGES[0])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=EPOCHS * BATCHES)
        precision = package.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        trainer = new_trainer(package, tmp_path, plugins=precision)
        flare.patch(trainer, restore_state=restore_state)
        net = lightning_net(package)
        while flare.is_running():
            trainer.fit(net, loader())
        assert scaler.get_scale() == (32.0 if restore_state else 16.0)

    def test_the_pull_is_scaled_like_gradients_that_a_fused_optimizer_will_unscale(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        package = importlib.import_module(PACKAGES[0])

        def train(fused: bool) -> dict[str, torch.Tensor]:
            host = serve(config={"fedprox_mu": 0.5})
            precision = package.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
            trainer = new_trainer(package, tmp_path, plugins=precision)
            flare.patch(trainer)
            net = lightning_net(package)
            net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
            trainer.fit(net, loader())
            return host.params_sent()

        for fused, plain in zip(train(True).values(), train(False).values(), strict=True):
            assert torch.allclose(fused, plain, atol=1e-6)

    def test_other_optimizers_than_in_the_round_before_are_an_error_that_names_the_remedy(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(["train"] * 2)
        package = importlib.import_module(PACKAGES[0])
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        trainer.fit(net, loader())
        net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.1)
        with pytest.raises(
            ClientError, match=r"1 optimizers and 0 schedulers, .* before 1 and 1: .*restore_state=False"
        ):
            trainer.fit(net, loader())

    def test_a_fit_that_raises_sends_nothing_and_leaves_the_limits_as_they_were(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve()
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        net.on_train_epoch_end = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.fit(net, loader())
        assert host.updates == []
        assert trainer.max_epochs == EPOCHS

    def test_standalone_a_script_trains_its_own_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(fedpool.client, "_client", Client(Standalone()))
        package = importlib.import_module(PACKAGES[0])
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        while flare.is_running():
            trainer.validate(net, to_score(), verbose=False)
            trainer.fit(net, loader())
        assert "sent 2 parameters, val_loss = " in capsys.readouterr().out

    def test_after_the_job_fit_and_validate_are_the_scripts_own(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve([])
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        assert not flare.is_running()
        trainer.fit(net, loader())
        trainer.validate(net, to_score(), verbose=False)
        assert trainer.global_step == EPOCHS * BATCHES
        assert host.updates == []


class TestScoring:
    """Which scores count as the received model's."""

    def test_validate_scores_the_received_model_and_its_metrics_travel_with_the_update(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve()
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        assert flare.is_running()
        (results,) = trainer.validate(net, to_score(), verbose=False)
        trainer.fit(net, loader(), to_score())
        (update,) = host.updates
        assert update["metrics"] == pytest.approx(results)
        assert update["metrics"]["bias"] == INITIAL["layer.bias"].item()
        assert update["num_params"] == 2

    def test_validation_and_sanity_checks_within_fit_are_no_score(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve()
        trainer = new_trainer(package, tmp_path, num_sanity_val_steps=2)
        flare.patch(trainer)
        trainer.fit(lightning_net(package), loader(), to_score())
        assert "val_loss" in trainer.callback_metrics
        assert host.updates[0]["metrics"] == {}

    def test_validate_after_fit_looks_at_the_trained_model_and_takes_no_round(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 2)
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        trainer.fit(net, loader())
        (results,) = trainer.validate(net, to_score(), verbose=False)
        assert results["bias"] == host.params_sent()["layer.bias"].item()
        assert len(host.plan) == 1

    def test_validate_without_a_model_scores_the_received_one_and_no_checkpoint(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 2)
        checkpoint = package.callbacks.ModelCheckpoint(tmp_path / "checkpoints")
        trainer = new_trainer(package, tmp_path, callbacks=[checkpoint])
        flare.patch(trainer)
        net = lightning_net(package)
        trainer.fit(net, loader())
        with (tmp_path / "global-1").open("wb") as file:
            save_and_hash(file, INITIAL)
        assert flare.is_running()
        (results,) = trainer.validate(dataloaders=to_score(), verbose=False)
        assert results["bias"] == INITIAL["layer.bias"].item()
        assert len(host.updates) == 1

    def test_a_validated_checkpoint_is_not_the_received_model(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 2)
        checkpoint = package.callbacks.ModelCheckpoint(tmp_path / "checkpoints")
        trainer = new_trainer(package, tmp_path, callbacks=[checkpoint])
        flare.patch(trainer)
        net = lightning_net(package)
        trainer.fit(net, loader())
        trainer.validate(net, to_score(), ckpt_path=checkpoint.best_model_path, verbose=False)
        trainer.fit(net, loader())
        assert [update["metrics"] for update in host.updates] == [{}, {}]


class TestOtherTasks:
    """Rounds with tasks other than training."""

    @pytest.mark.parametrize("validates", [True, False], ids=["validate and fit", "fit"])
    @pytest.mark.parametrize("loop", ["datamodule", "loaders", "datamodule as loaders"])
    def test_an_evaluation_scores_and_trains_nothing(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path, validates: bool, loop: str
    ) -> None:
        class Data(package.LightningDataModule):  # type: ignore[misc, name-defined]
            def train_dataloader(self) -> DataLoader[Any]:
                return loader()

            def val_dataloader(self) -> DataLoader[Any]:
                return to_score()

        host = serve(["train", "evaluate", "train"])
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        data = Data()
        while flare.is_running():
            if validates:
                trainer.validate(net, verbose=False, datamodule=data)
            if loop == "datamodule":
                trainer.fit(net, datamodule=data)
            elif loop == "loaders":
                trainer.fit(net, loader(), to_score())
            else:
                trainer.fit(net, data)
        assert [update["num_params"] for update in host.updates] == [2, 0, 2]
        assert host.updates[1]["metrics"]["bias"] == host.params_sent(0)["layer.bias"].item()
        assert trainer.global_step == 2 * EPOCHS * BATCHES

    @pytest.mark.parametrize("tasks", [["train", "submit_model"], ["train", "evaluate", "submit_model"]])
    def test_the_sites_own_model_is_what_it_trained_last(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path, tasks: list[str]
    ) -> None:
        host = serve(tasks)
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        trained = None
        while flare.is_running():
            if trained is not None:  # the mean of the sites' models, not what this site has trained
                for assignment in host.plan:
                    assert assignment is not None
                    with open(str(assignment.model), "wb") as file:
                        save_and_hash(file, INITIAL)
            own_task = flare.is_submit_model()
            results = trainer.validate(net, to_score(), verbose=False)
            trainer.fit(net, loader())
            trained = trained or host.params_sent(0)
        assert own_task
        assert results == []
        assert same_bits(host.params_sent(len(tasks) - 1), trained or {})
        assert trainer.global_step == EPOCHS * BATCHES

    def test_the_sites_own_model_is_the_best_checkpoint_where_a_metric_decides(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train", "submit_model"])
        checkpoint = package.callbacks.ModelCheckpoint(tmp_path / "checkpoints", monitor="bias", mode="max")
        trainer = new_trainer(package, tmp_path, callbacks=[checkpoint])
        flare.patch(trainer)
        net = lightning_net(package)
        while flare.is_running():
            trainer.fit(net, loader(), to_score())
        best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
        assert same_bits(host.params_sent(1), best)

    def test_a_best_checkpoint_that_is_gone_is_an_error(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(["train", "submit_model"])
        checkpoint = package.callbacks.ModelCheckpoint(tmp_path / "checkpoints", monitor="bias")
        trainer = new_trainer(package, tmp_path, callbacks=[checkpoint])
        flare.patch(trainer)
        net = lightning_net(package)
        trainer.fit(net, loader(), to_score())
        Path(checkpoint.best_model_path).unlink()
        with pytest.raises(ClientError, match="cannot be read"):
            trainer.fit(net, loader(), to_score())

    def test_a_site_that_has_trained_nothing_has_no_model_of_its_own(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(["submit_model"])
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        with pytest.raises(ClientError, match="has trained none yet"):
            trainer.fit(lightning_net(package), loader())


class TestFitting:
    """Whether a received model fits this module."""

    def test_a_wrong_shape_is_named_with_both(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(model={**INITIAL, "layer.weight": torch.zeros(1, 4)})
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        with pytest.raises(ClientError, match=r"layer\.weight: expected \(1, 3\), got \(1, 4\)"):
            trainer.fit(lightning_net(package), loader())

    @pytest.mark.parametrize(
        ("own", "received", "message"),
        [
            (["a"], ["a", "b"], "b is not in this model$"),
            (["a", "b"], ["a"], "b is missing$"),
            (["model.a", "model.b"], ["a", "b"], r"Every name has the prefix 'model\.' in this model and lacks it"),
            (["a", "b"], ["net.a", "net.b"], r"Every name has the prefix 'net\.' in the received model"),
            (["x.b"], ["a", "b"], "a is not in this model; b is not in this model$"),
            (["a"], [], "a is missing$"),
            ([], list("abcdefgh"), r"e is not in this model \(and 3 more\)$"),
        ],
    )
    def test_names_that_differ_are_named(self, own: list[str], received: list[str], message: str) -> None:
        with pytest.raises(ClientError, match=message):
            fitting_params({n: torch.ones(2) for n in own}, {n: torch.ones(2) for n in received}, strict=True)

    def test_without_strict_what_fits_is_trained_and_the_rest_goes_back_as_it_came(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        other = torch.arange(8.0).reshape(2, 4)
        host = serve(model={"layer.weight": other, "layer.bias": INITIAL["layer.bias"], "head": other})
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer, strict=False)
        net = lightning_net(package)
        trainer.validate(net, to_score(), verbose=False)
        trainer.fit(net, loader())
        sent = host.params_sent()
        assert sent["layer.bias"] == net.layer.bias
        assert sent["layer.weight"].tolist() == sent["head"].tolist() == other.tolist()
        assert host.updates[0]["metrics"]["bias"] == INITIAL["layer.bias"].item()


class TestOptionsOfNvflare:
    """`patch` takes the options of NVFlare's `patch`, by name or position, with the same effect."""

    def test_load_state_dict_strict_false_loads_the_names_that_both_have(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(model={"layer.weight": INITIAL["layer.weight"], "head": torch.ones(2)})
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer, True, False)
        net = lightning_net(package)
        trainer.validate(net, to_score(), verbose=False)
        assert torch.equal(net.layer.weight, INITIAL["layer.weight"])

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                {"layer.weight": torch.ones(2, 4), "layer.bias": INITIAL["layer.bias"]},
                r"expected \(1, 3\), got \(2, 4\)",
            ),
            ({"head": torch.ones(2)}, "head is not in this model"),
        ],
    )
    def test_it_still_refuses_another_shape_and_a_model_of_other_names(
        self,
        model: dict[str, torch.Tensor],
        message: str,
        package: ModuleType,
        serve: Callable[..., MemoryHost],
        tmp_path: Path,
    ) -> None:
        serve(model=model)
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer, load_state_dict_strict=False)
        with pytest.raises(ClientError, match=message):
            trainer.fit(lightning_net(package), loader())

    def test_load_state_dict_strict_true_is_strict(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(model={"layer.weight": INITIAL["layer.weight"]})
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer, load_state_dict_strict=True, strict=False)
        with pytest.raises(ClientError, match=r"layer\.bias is missing"):
            trainer.fit(lightning_net(package), loader())

    def test_without_update_fit_loop_the_limits_are_the_scripts_own(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 3)
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer, update_fit_loop=False)
        for _ in range(2):
            trainer.fit(lightning_net(package), loader())
        trainer.fit_loop.max_epochs += 1
        trainer.fit(lightning_net(package), loader())
        steps = [update["meta"]["NUM_STEPS_CURRENT_ROUND"] for update in host.updates]
        assert steps == [EPOCHS * BATCHES, 0, BATCHES]

    def test_fl_meta_of_the_module_is_sent(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 2)
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        net.__fl_meta__ = {"note": "mine"}
        trainer.fit(net, loader())
        net.__fl_meta__ = {"NUM_STEPS_CURRENT_ROUND": 3}
        trainer.fit(net, loader())
        assert [update["meta"] for update in host.updates] == [
            {"NUM_STEPS_CURRENT_ROUND": EPOCHS * BATCHES, "note": "mine"},
            {"NUM_STEPS_CURRENT_ROUND": 3},
        ]

    def test_fl_meta_that_is_no_dict_is_an_error(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve()
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        net = lightning_net(package)
        net.__fl_meta__ = ["NUM_STEPS_CURRENT_ROUND"]
        with pytest.raises(ClientError, match="__fl_meta__ of LightningNet must be a dict, got list"):
            trainer.fit(net, loader())

    def test_its_logger_sends_what_the_module_logs(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve()
        trainer = new_trainer(package, tmp_path, logger=flare.logger("mine"), log_every_n_steps=1)
        flare.patch(trainer)
        trainer.validate(lightning_net(package), to_score(), verbose=False)
        logged = {message["key"]: message["value"] for message in host.sent if message["kind"] == "log"}
        assert logged["mine-bias"] == INITIAL["layer.bias"].item()
        assert "mine-val_loss" in logged


class TestPatch:
    """What can be patched, and how often."""

    def test_patching_twice_changes_nothing(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve()
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        callbacks, fit = list(trainer.callbacks), trainer.fit
        flare.patch(trainer)
        assert trainer.callbacks == callbacks
        assert trainer.fit == fit
        trainer.fit(lightning_net(package), loader())
        assert len(host.updates) == 1

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"restore_state": False}, "restore_state=False after restore_state=True"),
            ({"strict": False}, "strict=False after strict=True"),
            ({"update_fit_loop": False}, "update_fit_loop=False after update_fit_loop=True"),
        ],
    )
    def test_patching_again_with_other_options_is_an_error_that_names_them(
        self,
        option: dict[str, bool],
        message: str,
        package: ModuleType,
        serve: Callable[..., MemoryHost],
        tmp_path: Path,
    ) -> None:
        serve()
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        with pytest.raises(ClientError, match=f"already patched with other options: {message}; call"):
            flare.patch(trainer, **option)

    def test_it_exports_the_client_api_patch_and_logger(self) -> None:
        assert set(flare.__all__) == {*fedpool.client.__all__, "patch", "logger"}
        assert flare.is_running is fedpool.client.is_running
        assert flare.FLModel is fedpool.client.FLModel

    def test_something_else_than_a_trainer_is_refused(self) -> None:
        with pytest.raises(ClientError, match=r"Trainer of pytorch_lightning or lightning\.pytorch, got Net"):
            flare.patch(Net())

    @pytest.mark.parametrize("strategy", ["ddp_spawn", "fsdp"])
    def test_a_strategy_without_a_whole_model_here_is_refused(
        self, strategy: str, package: ModuleType, tmp_path: Path
    ) -> None:
        if strategy == "fsdp":  # Trainer refuses it without a GPU
            trainer = new_trainer(package, tmp_path)
            trainer.strategy.__class__ = package.strategies.FSDPStrategy
        else:
            trainer = new_trainer(package, tmp_path, strategy=strategy, devices=2)
        with pytest.raises(ClientError, match=r'strategy .* does not keep a whole model .*strategy="ddp"'):
            flare.patch(trainer)

    def test_a_checkpoint_to_fit_from_is_refused(
        self, package: ModuleType, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve()
        trainer = new_trainer(package, tmp_path)
        flare.patch(trainer)
        with pytest.raises(ClientError, match="would replace the received model"):
            trainer.fit(lightning_net(package), loader(), ckpt_path="last")


# Each rank writes what it saw. Each has its own data, so equal results show that the ranks trained
# together.
RANKS_SCRIPT = """
import json, os, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import pytorch_lightning as pl
import fedpool.client.lightning as flare

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.started = []

    def on_train_start(self):
        self.started.append(self.layer.bias.tolist())

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("bias", self.layer.bias.detach()[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if sys.argv[2] == "first":
    flare.init()
trainer = pl.Trainer(max_epochs=1, strategy="ddp", devices=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
flare.patch(trainer)
seen = {"site": flare.get_site_name(), "tasks": []}
net = Net()
data = DataLoader(TensorDataset(torch.randn(8, 3, generator=torch.Generator().manual_seed(trainer.global_rank))), batch_size=4)
while flare.is_running():
    seen["tasks"].append(flare.get_task_name())
    trainer.validate(net, data, verbose=False)
    trainer.fit(net, data)
seen |= {"started": net.started, "bias": net.layer.bias.tolist(), "weight": net.layer.weight.tolist()}
with open(os.path.join(sys.argv[1], f"rank-{trainer.global_rank}.json"), "w") as file:
    json.dump(seen, file)
torch.distributed.destroy_process_group()
"""


class TestRanks:
    """Two processes on gloo: rank 0 talks, whichever launcher started them."""

    @pytest.mark.parametrize("launcher", ["lightning", pytest.param("torchrun", marks=pytest.mark.slow)])
    def test_ranks_train_together_and_one_of_them_talks(self, tmp_path: Path, launcher: str) -> None:
        tasks = ["train", "train", "evaluate"]
        plan = [a for a in OneSite(tmp_path, INITIAL, tasks).plan if a is not None]
        script = tmp_path / "client.py"
        script.write_text(RANKS_SCRIPT)
        command = [str(script), str(tmp_path), "first" if launcher == "lightning" else "patch"]
        if launcher == "torchrun":
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDPOOL_")}
        with tempfile.TemporaryDirectory(
            prefix="fp-"
        ) as short:  # the path of a Unix socket is limited to about 100 bytes
            host = SessionThread(f"{short}/s", b"secret", plan)
            host.start()
            session = {ADDRESS_VARIABLE: f"{short}/s", KEY_VARIABLE: b"secret".hex(), "OMP_NUM_THREADS": "1"}
            ran = subprocess.run(
                [sys.executable, *command],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env={**environment, **session},
                timeout=400,
            )
            assert ran.returncode == 0, ran.stderr
            host.join(120)
        zero, one = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
        assert zero == one
        assert zero["site"] == "site-7"
        assert zero["tasks"] == tasks
        assert zero["started"] == [INITIAL["layer.bias"].tolist()] * 2
        updates = [message for message in host.messages if message["kind"] == "update"]
        assert [update["meta"] for update in updates] == [{"NUM_STEPS_CURRENT_ROUND": 2}] * 2 + [{}]
        assert [update["metrics"] for update in updates] == [{"bias": INITIAL["layer.bias"].item()}] * 3
        assert [message["kind"] for message in host.messages].count("hello") == 1


# A user's script, whose logged scores the test reads.
JOB_SCRIPT = """
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    import {package} as pl
    import fedpool.client.lightning as flare

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)
    flare.patch(trainer)
    site = int(flare.get_site_name().split("-")[1])
    inputs = torch.randn(4 * site, 3, generator=torch.Generator().manual_seed(site))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    net = Net()
    while flare.is_running():
        trainer.validate(net, DataLoader(data, batch_size=4), verbose=False)
        trainer.fit(net, DataLoader(data, batch_size=4, shuffle=True))
"""

JOB_PLAIN_SCRIPT = """
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    import fedpool.client as flare

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

    flare.init()
    site = int(flare.get_site_name().split("-")[1])
    inputs = torch.randn(4 * site, 3, generator=torch.Generator().manual_seed(site))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    while flare.is_running():
        net.load_state_dict(flare.receive().params)
        with torch.no_grad():
            losses = [(net.layer(x) - y).square().mean() * len(x) for x, y in zip(inputs.split(4), data.tensors[1].split(4))]
        metrics = {"val_loss": sum(losses) / len(inputs)}
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=metrics))
            continue
        for _ in range(2):
            for x, y in DataLoader(data, batch_size=4, shuffle=True):
                optimizer.zero_grad()
                (net.layer(x) - y).square().mean().backward()
                optimizer.step()
        meta = {"NUM_STEPS_CURRENT_ROUND": 2 * site}
        flare.send(flare.FLModel(params=net.state_dict(), metrics=metrics, meta=meta))
"""


class TestJobs:
    """Whole jobs in simulation."""

    def test_a_job_of_lightning_scripts_gives_the_bits_of_one_of_plain_loops(self, run_job: Callable[..., Run]) -> None:
        net = Net()
        net.load_state_dict(INITIAL)
        jobs = {"model": net, "num_rounds": 3}
        plain = run_job(JOB_PLAIN_SCRIPT, **jobs).get_result()
        result = run_job(JOB_SCRIPT.format(package=PACKAGES[0]), **jobs).get_result()
        assert same_bits(result.params, plain.params)
        scores, expected = ([m["val_loss"] for m in r.metrics] for r in (result, plain))
        assert scores == pytest.approx(expected)
        assert len(scores) == 4  # the last is the evaluation of the final model
        assert scores[-1] < scores[0] / 2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "begin", "beside"),
        [
            (ScaffoldRecipe, "control = flare.Scaffold(net, optimizer)", "extras=control.extras()"),
            (FedNovaRecipe, "steps = flare.LocalSteps(optimizer)", 'meta={"LOCAL_STEPS": steps.close(), **meta}'),
        ],
        ids=["scaffold", "fednova"],
    )
    def test_what_an_algorithm_wants_of_the_steps_is_done_as_a_plain_loop_does_it(
        self, kind: type[Recipe], begin: str, beside: str, run_job: Callable[..., Run]
    ) -> None:
        net = Net()
        net.load_state_dict(INITIAL)
        script = JOB_PLAIN_SCRIPT.replace("for _ in range(2):", f"{begin}\n        for _ in range(2):")
        assert begin in script
        script = script.replace(
            "metrics=metrics, meta=meta", f"metrics=metrics, {beside}" + ", meta=meta" * (kind is ScaffoldRecipe)
        )
        assert beside in script
        plain = run_job(script, kind=kind, model=net).get_result()
        result = run_job(JOB_SCRIPT.format(package=PACKAGES[0]), kind=kind, model=net).get_result()
        assert same_bits(result.params, plain.params)
        averaged = run_job(JOB_PLAIN_SCRIPT, model=net).get_result()
        assert not same_bits(averaged.params, plain.params)

    def test_a_model_that_does_not_fit_fails_its_site_with_the_names(self, run_job: Callable[..., Run]) -> None:
        run = run_job(
            JOB_SCRIPT.format(package=PACKAGES[0]), model={"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}
        )
        with pytest.raises(JobFailed, match=r"Every name has the prefix 'layer\.' in this model and lacks it"):
            run.get_result()


class TestProximalTerm:
    """The gradient that FedProx adds."""

    def test_a_parameter_without_a_gradient_gets_the_pull_alone(self) -> None:
        parameter = nn.Parameter(torch.tensor([3.0]))
        add_proximal_gradient(parameter, torch.tensor([1.0]), 0.25)
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [0.5]

    @pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf"), "0.1", True, None])
    def test_a_strength_that_is_no_number_from_0_is_refused(self, mu: Any) -> None:
        with pytest.raises(ClientError, match="fedprox_mu in the config must be a finite number from 0, got"):
            proximal_mu({"fedprox_mu": mu})


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows whose number is unknown."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(INPUTS, TARGETS, strict=True)


def trained_with(serve: Callable[..., MemoryHost], package: ModuleType, folder: Path, data: Any, **config: Any) -> Any:
    """Train one round on the data, unshuffled; returns the host with what was sent."""
    host = serve(config=config)
    trainer = new_trainer(package, folder)
    flare.patch(trainer)
    trainer.fit(lightning_net(package), DataLoader(data, batch_size=4))
    return host


class TestWeights:
    """The weight of an update: its steps, or rows for FedNova, which corrects for steps itself."""

    def test_fednova_has_the_rows_for_the_weight_and_the_reach_of_the_steps(
        self, serve: Callable[..., MemoryHost], package: ModuleType, tmp_path: Path
    ) -> None:
        data = TensorDataset(INPUTS, TARGETS)
        meta = trained_with(serve, package, tmp_path, data, algorithm="fednova").updates[0]["meta"]
        assert meta["NUM_STEPS_CURRENT_ROUND"] == BATCHES * 4
        net = Net()
        optimizer, scheduler = new_optimizer(net)
        steps = fedpool.client.LocalSteps(optimizer)
        for _ in range(EPOCHS):
            for _ in range(BATCHES):
                for parameter in net.parameters():
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
            scheduler.step()
        assert meta["LOCAL_STEPS"] == steps.close() > EPOCHS * BATCHES

    def test_any_other_recipe_has_the_steps(
        self, serve: Callable[..., MemoryHost], package: ModuleType, tmp_path: Path
    ) -> None:
        meta = trained_with(serve, package, tmp_path, TensorDataset(INPUTS, TARGETS)).updates[0]["meta"]
        assert meta["NUM_STEPS_CURRENT_ROUND"] == EPOCHS * BATCHES

    def test_rows_that_cannot_be_counted_are_refused(
        self, serve: Callable[..., MemoryHost], package: ModuleType, tmp_path: Path
    ) -> None:
        with pytest.raises(ClientError, match="a Stream does not say how many it has"):
            trained_with(serve, package, tmp_path, Stream(), algorithm="fednova")

    @pytest.mark.filterwarnings("ignore:Total length of `DataLoader`", "ignore:Total length of `CombinedLoader`")
    @pytest.mark.parametrize("algorithm", ["fednova", "scaffold", "none"])
    def test_without_data_an_update_has_weight_0(
        self, serve: Callable[..., MemoryHost], package: ModuleType, tmp_path: Path, algorithm: str
    ) -> None:
        nothing = TensorDataset(INPUTS[:0], TARGETS[:0])
        host = trained_with(serve, package, tmp_path, nothing, algorithm=algorithm)
        assert host.updates[0]["meta"]["NUM_STEPS_CURRENT_ROUND"] == 0
        sent = host.params_sent()
        assert {name: value for name, value in sent.items() if "::" not in name}.keys() == INITIAL.keys()
        assert all(torch.equal(sent[name], value) for name, value in INITIAL.items())
        assert algorithm != "fednova" or host.updates[0]["meta"]["LOCAL_STEPS"] == 0
        assert algorithm != "scaffold" or not sent["control::layer.weight"].any()
