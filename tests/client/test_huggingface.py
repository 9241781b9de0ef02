"""The transformers Trainer as a client: what `train` and `evaluate` do in a round, on tiny models
made from a config.
"""

import gc
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: no test may access the network

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated modules that the packages import
    import peft
    import transformers

    import fedpool.client.huggingface as flare

import fedpool.client
from fedpool import Run
from fedpool.arrays import save_and_hash
from fedpool.client.api import Client
from fedpool.client.hosts import Standalone
from fedpool.client.scopes import trainable_params
from fedpool.errors import ClientError
from tests.client.test_torchrun import run_session
from tests.hosts import MemoryHost, OneSite

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|accelerate|peft|torch).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(transformers|accelerate|peft|torch).*"),
]

NUM_EXAMPLES = 16
STEPS = 4  # batches of four


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Sequences of random tokens, labelled by the parity of the first."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(0, 16, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": int(tokens[0]) % 2}


def new_model(seed: int = 0, dropout: float = 0.0) -> Any:
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def new_trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": NUM_EXAMPLES // STEPS,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    others = {name: options.pop(name) for name in ("optimizers", "model_init", "eval_dataset") if name in options}
    args = transformers.TrainingArguments(output_dir=str(folder), **arguments | options)
    fields: dict[str, Any] = {"train_dataset": Examples(), "eval_dataset": Examples()} | others
    return transformers.Trainer(model=model, args=args, **fields)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """transformers collects garbage in each `train()`: 0.3 s, most of the tests' time, unless
    imported objects are exempt.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MemoryHost]:
    """Makes this process a client of an in-memory host: `serve(tasks, model=..., config=...)`."""

    def start(
        tasks: Sequence[str] = ("train",),
        model: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> MemoryHost:
        host = OneSite(tmp_path, model or new_model().state_dict(), tasks, config)
        monkeypatch.setattr(fedpool.client, "_client", Client(host))
        return host

    return start


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum((left[name] - right[name]).square().sum().item() for name in left))


class TestTraining:
    """What a round trains, and what it sends."""

    def test_a_round_starts_from_the_received_model_and_sends_what_transformers_alone_comes_to(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve()
        model = new_model(seed=1)
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer)
        while flare.is_running():
            trainer.evaluate()
            output = trainer.train()
        alone = new_model()
        oracle = new_trainer(tmp_path, alone)
        torch.manual_seed(0)  # the round's seed
        oracle.train()
        assert output.global_step == STEPS
        assert same_bits(host.params_sent(), alone.state_dict())
        assert host.updates[0]["meta"] == {"NUM_STEPS_CURRENT_ROUND": STEPS}

    def test_scoring_changes_no_bit_of_the_training(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        def train(scores: bool) -> dict[str, torch.Tensor]:
            host = serve(["train"] * 2)
            trainer = new_trainer(tmp_path, new_model(dropout=0.5))
            flare.patch(trainer)
            while flare.is_running():
                if scores:
                    trainer.evaluate()
                trainer.train()
            return host.params_sent(1)

        assert same_bits(train(True), train(False))

    def test_epochs_and_steps_count_per_round_and_the_schedule_spans_the_job(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 3)
        trainer = new_trainer(tmp_path, new_model(), max_steps=5)
        flare.patch(trainer)
        rates, schedulers, optimizers = [], set(), set()
        while flare.is_running():
            trainer.train()
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            schedulers.add(trainer.lr_scheduler)
            optimizers.add(trainer.optimizer)
        assert [update["meta"]["NUM_STEPS_CURRENT_ROUND"] for update in host.updates] == [5] * 3
        assert rates == pytest.approx([0.01 * 2 / 3, 0.01 / 3, 0.0])
        assert (len(schedulers), len(optimizers)) == (1, 1)

    def test_with_fresh_state_each_round_has_a_schedule_and_an_optimizer_of_its_own(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(["train"] * 2)
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer, restore_state=False)
        rates, optimizers = [], []
        while flare.is_running():
            trainer.train()
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            optimizers.append(trainer.optimizer)
        assert rates == [0.0, 0.0]
        assert optimizers[0] is not optimizers[1]

    @pytest.mark.parametrize("restore_state", [True, False])
    def test_an_optimizer_and_a_schedule_of_ones_own_are_kept_or_put_back(
        self, serve: Callable[..., MemoryHost], tmp_path: Path, restore_state: bool
    ) -> None:
        serve(["train"] * 2)
        model = new_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, STEPS, gamma=0.5)
        trainer = new_trainer(tmp_path, model, optimizers=(optimizer, schedule))
        flare.patch(trainer, restore_state=restore_state)
        while flare.is_running():
            trainer.train()
        assert trainer.lr_scheduler is schedule
        assert schedule.get_last_lr() == [0.0025 if restore_state else 0.005]

    def test_fedprox_keeps_the_model_near_the_received_one(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        def train(mu: float) -> dict[str, torch.Tensor]:
            host = serve(["train"] * 2, config={"fedprox_mu": mu})
            model = new_model()
            trainer = new_trainer(tmp_path, model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
            flare.patch(trainer)
            while flare.is_running():
                trainer.train()
            return host.params_sent(1)

        initial = new_model().state_dict()
        assert distance(train(10.0), initial) < distance(train(1.0), initial) < distance(train(0.0), initial)

    def test_fedprox_adds_the_gradient_of_its_term(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        host = serve(config={"fedprox_mu": 0.5})
        model = new_model(seed=1)
        trainer = new_trainer(
            tmp_path,
            model,
            max_steps=2,
            max_grad_norm=0,
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        )
        trainer.args.lr_scheduler_type = "constant"
        flare.patch(trainer)
        trainer.train()

        alone = new_model()
        received = [parameter.detach().clone() for parameter in alone.parameters()]
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)

        def add_the_term(*_: Any) -> None:
            for parameter, anchor in zip(alone.parameters(), received, strict=True):
                parameter.grad.add_(0.5 * (parameter.detach() - anchor))

        optimizer.register_step_pre_hook(add_the_term)
        oracle = new_trainer(tmp_path, alone, max_steps=2, max_grad_norm=0, optimizers=(optimizer, None))
        oracle.args.lr_scheduler_type = "constant"
        torch.manual_seed(0)  # the round's seed
        oracle.train()
        assert same_bits(host.params_sent(), alone.state_dict())

    def test_a_train_that_raises_sends_nothing_and_the_round_can_be_done_again(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        class Raises(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                raise ZeroDivisionError

        host = serve(config={"fedprox_mu": 1.0})
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        trainer.add_callback(Raises)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert host.updates == []
        trainer.remove_callback(Raises)
        trainer.train()
        assert len(host.updates) == 1
        assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks

    def test_a_grad_scaler_starts_afresh_with_the_rest(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        serve()
        trainer = new_trainer(tmp_path, new_model())
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # accelerate makes one for a GPU only
        flare.patch(trainer, restore_state=False)
        trainer.accelerator.scaler.load_state_dict({**trainer.accelerator.scaler.state_dict(), "scale": 2.0})
        trainer.train()
        assert trainer.accelerator.scaler.get_scale() == 8.0

    def test_standalone_a_script_trains_its_own_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(fedpool.client, "_client", Client(Standalone()))
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        while flare.is_running():
            trainer.evaluate()
            trainer.train()
        assert "parameters, eval_loss = 0." in capsys.readouterr().out

    def test_after_the_job_train_and_evaluate_are_the_scripts_own(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve([])
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        assert not flare.is_running()
        assert trainer.train().global_step == STEPS
        assert "eval_runtime" in trainer.evaluate()
        assert host.updates == []


class TestScoring:
    """Which scores count as the received model's."""

    @pytest.mark.parametrize("several", [False, True], ids=["one dataset", "several"])
    def test_evaluate_scores_the_received_model_and_its_metrics_travel_without_the_timings(
        self, serve: Callable[..., MemoryHost], tmp_path: Path, several: bool
    ) -> None:
        data = {"eval_dataset": {"a": Examples(), "b": Examples()}} if several else {}
        host = serve()
        trainer = new_trainer(tmp_path, new_model(seed=1), eval_strategy="epoch", **data)
        flare.patch(trainer)
        assert flare.is_running()
        metrics = trainer.evaluate()
        trainer.train()
        names = ["eval_a_loss", "eval_b_loss"] if several else ["eval_loss"]
        (update,) = host.updates
        assert update["metrics"] == {name: metrics[name] for name in names}
        alone = new_trainer(tmp_path, new_model()).evaluate()
        assert update["metrics"][names[0]] == alone["eval_loss"]

    def test_evaluation_within_train_is_no_score(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        host = serve()
        trainer = new_trainer(tmp_path, new_model(), eval_strategy="epoch")
        flare.patch(trainer)
        trainer.train()
        assert host.updates[0]["metrics"] == {}

    def test_evaluate_after_train_looks_at_the_trained_model_and_takes_no_round(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 2)
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        trainer.train()
        trainer.evaluate()
        assert same_bits(trainer.model.state_dict(), host.params_sent())
        assert len(host.plan) == 1


class TestOtherTasks:
    """Rounds with tasks other than training."""

    @pytest.mark.parametrize("evaluates", [True, False], ids=["evaluate and train", "train"])
    def test_an_evaluation_scores_and_trains_nothing(
        self, serve: Callable[..., MemoryHost], tmp_path: Path, evaluates: bool
    ) -> None:
        host = serve(["train", "evaluate", "train"])
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        steps = []
        while flare.is_running():
            if evaluates:
                trainer.evaluate()
            steps.append(trainer.train().global_step)
        assert steps == [STEPS, 0, STEPS]
        assert [bool(update["num_params"]) for update in host.updates] == [True, False, True]
        assert host.updates[1]["metrics"].keys() == {"eval_loss"}

    @pytest.mark.parametrize("tasks", [["train", "submit_model"], ["train", "evaluate", "submit_model"]])
    def test_the_sites_own_model_is_what_it_trained_last(
        self, serve: Callable[..., MemoryHost], tmp_path: Path, tasks: list[str]
    ) -> None:
        host = serve(tasks)
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        trainer.train()
        for assignment in host.plan:  # the mean of the sites' models, not what this site has trained
            assert assignment is not None
            with open(str(assignment.model), "wb") as file:
                save_and_hash(file, new_model().state_dict())
        while flare.is_running():
            last = trainer.evaluate()
            trainer.train()
        assert last == {}
        assert same_bits(host.params_sent(len(tasks) - 1), host.params_sent(0))


class TestAdapters:
    """Only trained parameters are exchanged."""

    def test_only_adapters_are_exchanged_and_the_base_stays(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        model = peft.get_peft_model(
            new_model(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        )
        initial = {name: value + 0.5 for name, value in trainable_params(model).items()}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        host = serve(["train"] * 2, model=initial)
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer, params_scope="trainable")
        while flare.is_running():
            trainer.evaluate()
            trainer.train()
        sent = host.params_sent(1)
        assert sent.keys() == initial.keys()
        assert len(initial) < len(before) / 3
        assert all("lora_" in name or "classifier" in name for name in sent)
        assert not any(torch.equal(sent[name], initial[name]) for name in sent)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before if name not in sent)

    def test_a_whole_model_for_a_script_that_exchanges_adapters_is_an_error(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        model = new_model()
        for parameter in model.bert.parameters():
            parameter.requires_grad = False
        serve()
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer, params_scope="trainable")
        with pytest.raises(ClientError, match=r"bert\.\S+ is not in this model; .* \(and \d+ more\)$"):
            trainer.train()


def adapted(**options: Any) -> Any:
    """A PEFT model with adapters and a trained head."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **options)
    return peft.get_peft_model(new_model(), config)


NAME_FORMS: dict[str, Callable[[Any], Mapping[str, torch.Tensor]]] = {
    "the model's own names": trainable_params,
    "PEFT's names": lambda model: peft.get_peft_model_state_dict(model, save_embedding_layers=False),
    "the whole model": lambda model: model.state_dict(),
}


class TestPeftModels:
    """Adapters are recognised under either form of their names."""

    @pytest.mark.parametrize("form", NAME_FORMS)
    def test_without_an_option_what_is_received_is_what_is_exchanged(
        self, form: str, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        model = adapted()
        initial = {name: value + 0.5 for name, value in NAME_FORMS[form](model).items()}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        host = serve(["train"] * 2, model=initial)
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer)
        while flare.is_running():
            trainer.train()
        sent = host.params_sent(1)
        assert sent.keys() == initial.keys()
        trained = trainable_params(model)
        assert same_bits(NAME_FORMS[form](model), sent)
        assert not any(torch.equal(trained[name], before[name]) for name in trained)

    def test_both_forms_come_to_the_same_bits(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        results = []
        for form in ("the model's own names", "PEFT's names"):
            model = adapted()
            serve(model=NAME_FORMS[form](model))
            trainer = new_trainer(tmp_path, model)
            flare.patch(trainer, params_scope="trainable")
            trainer.train()
            results.append({name: value.clone() for name, value in model.state_dict().items()})
        assert same_bits(*results)

    @pytest.mark.parametrize("scope", ["auto", "all", "trainable", "adapter"])
    def test_the_base_model_for_a_peft_model_is_an_error_that_says_what_to_do(
        self, scope: Any, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(model=new_model().state_dict())
        trainer = new_trainer(tmp_path, adapted())
        flare.patch(trainer, params_scope=scope)
        with pytest.raises(
            ClientError,
            match=r'PEFT model: flare\.patch\(trainer, params_scope="trainable"\) exchanges its adapters only',
        ):
            trainer.train()

    def test_all_of_a_peft_model_does_not_take_its_adapters_and_the_error_names_the_option(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        model = adapted()
        serve(model=NAME_FORMS["PEFT's names"](model))
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer, params_scope="all")
        with pytest.raises(ClientError, match=r'params_scope="trainable"'):
            trainer.train()

    def test_a_second_adapter_is_not_mixed_up_with_the_active_one(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        model = adapted()
        model.add_adapter("other", peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]))
        initial = NAME_FORMS["PEFT's names"](model)
        host = serve(model=initial)
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer)
        trainer.train()
        assert host.params_sent().keys() == initial.keys()

    def test_the_fedprox_term_reaches_adapters_of_either_name(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        moved = {}
        for form in ("the model's own names", "PEFT's names"):
            for mu in (0.0, 1000.0):
                model = adapted()
                start = {name: value.clone() for name, value in trainable_params(model).items()}
                serve(model=NAME_FORMS[form](model), config={"fedprox_mu": mu})
                trainer = new_trainer(tmp_path, model, optim="sgd", learning_rate=0.0005)
                flare.patch(trainer)
                trainer.train()
                moved[form, mu] = distance(trainable_params(model), start)
        assert moved["PEFT's names", 0.0] == moved["the model's own names", 0.0]
        assert moved["PEFT's names", 1000.0] == moved["the model's own names", 1000.0] < moved["PEFT's names", 0.0]

    def test_scaffold_refuses_names_that_are_not_the_models_own(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        model = adapted()
        serve(model=NAME_FORMS["PEFT's names"](model), config={"algorithm": "scaffold"})
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer)
        with pytest.raises(
            ClientError, match=r"SCAFFOLD needs the module's own names, but '.*lora_A.weight' was received"
        ):
            trainer.train()

    def test_adapter_is_for_peft_models_only(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        serve()
        with pytest.raises(ClientError, match='params_scope="adapter" is for PEFT models, but this is a BertFor'):
            flare.patch(new_trainer(tmp_path, new_model()), params_scope="adapter")


class TestOptionsOfNvflare:
    """`patch` takes the options of NVFlare's `patch`, by name or position, with the same effect."""

    def test_a_prefix_of_the_servers_names_is_taken_off_and_put_on(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        model = adapted()
        initial = {f"model.{name}": value + 0.5 for name, value in NAME_FORMS["PEFT's names"](model).items()}
        host = serve(model=initial)
        trainer = new_trainer(tmp_path, model)
        flare.patch(trainer, True, True, "auto", "model.")
        trainer.train()
        sent = host.params_sent()
        assert sent.keys() == initial.keys()
        assert same_bits({f"model.{n}": v for n, v in NAME_FORMS["PEFT's names"](model).items()}, sent)

    @pytest.mark.parametrize(
        ("options", "steps"), [({"local_epochs": 2}, 2 * STEPS), ({"local_steps": 3}, 3), ({}, STEPS)]
    )
    def test_local_epochs_and_steps_are_of_a_round(
        self, options: dict[str, Any], steps: int, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        host = serve(["train"] * 2)
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer, **options)
        while flare.is_running():
            trainer.train()
        assert [update["meta"]["NUM_STEPS_CURRENT_ROUND"] for update in host.updates] == [steps] * 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"local_epochs": 1, "local_steps": 1}, "give local_epochs or local_steps, not both: got 1 and 1"),
            ({"local_steps": 0}, "local_steps must be a number above 0, got 0"),
        ],
    )
    def test_a_length_that_makes_no_sense_is_an_error(
        self, options: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ClientError, match=message):
            flare.patch(new_trainer(tmp_path, new_model()), **options)

    def test_stream_metrics_sends_what_the_trainer_logs(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        host = serve()
        trainer = new_trainer(tmp_path, new_model(), logging_strategy="steps", logging_steps=2)
        flare.patch(trainer, stream_metrics=True)
        trainer.train()
        losses = [message for message in host.sent if message["kind"] == "log" and message["key"] == "loss"]
        assert [message["where"] for message in losses] == [{"global_step": "2"}, {"global_step": "4"}]

    def test_load_state_dict_strict_false_still_refuses_another_shape(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve(model=new_model().state_dict() | {"classifier.weight": torch.ones(3, 8)})
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer, load_state_dict_strict=False)
        with pytest.raises(ClientError, match=r"classifier\.weight: expected \(2, 8\), got \(3, 8\)"):
            trainer.train()


class TestPatch:
    """What can be patched, and how often."""

    def test_patching_again_with_other_options_is_an_error_that_names_them(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve()
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        with pytest.raises(
            ClientError, match="this trainer was already patched with other options: strict=False after strict=True"
        ):
            flare.patch(trainer, strict=False)

    def test_a_second_trainer_is_warned_about_and_with_other_options_refused(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        serve()
        first, second = new_trainer(tmp_path, new_model()), new_trainer(tmp_path, new_model())
        flare.patch(first)
        with pytest.raises(
            ClientError, match="another trainer was already patched with other options: params_scope='all' after"
        ):
            flare.patch(second, params_scope="all")
        with pytest.warns(UserWarning, match=r"flare\.patch\(\) was called for a second trainer"):
            flare.patch(second)

    def test_patching_twice_changes_nothing(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        host = serve()
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        train, callbacks = trainer.train, list(trainer.callback_handler.callbacks)
        assert flare.patch(trainer) is trainer
        assert trainer.train == train
        assert trainer.callback_handler.callbacks == callbacks
        trainer.train()
        assert len(host.updates) == 1

    def test_it_exports_the_client_api_and_patch(self) -> None:
        assert set(flare.__all__) == {*fedpool.client.__all__, "patch"}
        assert flare.is_running is fedpool.client.is_running

    def test_something_else_than_a_trainer_is_refused(self) -> None:
        with pytest.raises(ClientError, match=r"takes a transformers\.Trainer, got dict"):
            flare.patch({})

    def test_an_unknown_scope_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            ClientError, match="params_scope must be one of 'auto', 'all', 'trainable', 'model', 'adapter', got 'lora'"
        ):
            flare.patch(new_trainer(tmp_path, new_model()), params_scope="lora")  # type: ignore[arg-type]

    def test_a_model_that_is_made_anew_in_each_train_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ClientError, match=r"give Trainer\(model=\.\.\.\)"):
            flare.patch(new_trainer(tmp_path, model_init=lambda: new_model()))

    @pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
    def test_a_model_that_is_not_whole_here_is_refused(self, tmp_path: Path, flag: str) -> None:
        trainer = new_trainer(tmp_path, new_model())
        setattr(trainer, flag, True)  # really enabling either one needs GPUs
        with pytest.raises(ClientError, match="do not keep the whole model"):
            flare.patch(trainer)

    def test_a_checkpoint_to_resume_from_is_refused(self, serve: Callable[..., MemoryHost], tmp_path: Path) -> None:
        serve()
        trainer = new_trainer(tmp_path, new_model())
        flare.patch(trainer)
        with pytest.raises(ClientError, match="would replace the received model"):
            trainer.train(resume_from_checkpoint=True)


# Each rank writes what it saw. transformers splits the data, so equal results show that the ranks
# trained together.
RANKS_SCRIPT = """
import json, os, sys
import torch
import transformers
import fedpool.client.huggingface as flare

config = transformers.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8, max_position_embeddings=8)
arguments = transformers.TrainingArguments(output_dir=sys.argv[1], use_cpu=True, report_to="none", save_strategy="no",
                                           disable_tqdm=True, num_train_epochs=1, ddp_backend="gloo")
data = [{"input_ids": torch.full((6,), n), "labels": n % 2} for n in range(16)]
trainer = transformers.Trainer(model=transformers.BertForSequenceClassification(config), args=arguments,
                               train_dataset=data, eval_dataset=data)
flare.patch(trainer)
seen = {"site": flare.get_site_name(), "tasks": []}
while flare.is_running():
    seen["tasks"].append(flare.get_task_name())
    trainer.evaluate()
    trainer.train()
seen["bias"] = trainer.model.classifier.bias.tolist()
with open(os.path.join(sys.argv[1], f"rank-{arguments.process_index}.json"), "w") as file:
    json.dump(seen, file)
torch.distributed.destroy_process_group()
"""


def test_under_torchrun_ranks_train_together_and_one_of_them_talks(tmp_path: Path) -> None:
    tasks = ["train", "train", "evaluate"]
    plan = [a for a in OneSite(tmp_path, new_model().state_dict(), tasks).plan if a is not None]
    host, ran = run_session(tmp_path, RANKS_SCRIPT, plan)
    assert ran.returncode == 0, ran.stderr
    zero, one = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert zero == one
    assert (zero["site"], zero["tasks"]) == ("site-7", tasks)
    updates = [message for message in host.messages if message["kind"] == "update"]
    assert [update["meta"] for update in updates] == [{"NUM_STEPS_CURRENT_ROUND": 1}] * 2 + [{}]
    assert [update["metrics"].keys() for update in updates] == [{"eval_loss"}] * 3
    assert [message["kind"] for message in host.messages].count("hello") == 1


JOB_SCRIPT = """
    import torch
    import transformers
    import fedpool.client.huggingface as flare

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            tokens = torch.randint(0, 16, (6,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": tokens, "labels": int(tokens[0]) % 2}

    config = transformers.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8, max_position_embeddings=8)
    arguments = transformers.TrainingArguments(output_dir=".", num_train_epochs=2, learning_rate=0.05, use_cpu=True,
                                               report_to="none", save_strategy="no", disable_tqdm=True)
    trainer = transformers.Trainer(model=transformers.BertForSequenceClassification(config), args=arguments,
                                   train_dataset=Examples(), eval_dataset=Examples())
    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()
        trainer.train()
"""


def test_a_job_of_transformers_scripts_learns(run_job: Callable[..., Run]) -> None:
    result = run_job(JOB_SCRIPT, model=new_model(), num_rounds=2).get_result()
    losses = [metrics["eval_loss"] for metrics in result.metrics]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


class TestWeights:
    """The weight of an update: its steps, or rows for FedNova, which corrects for steps itself."""

    def trained(
        self, serve: Callable[..., MemoryHost], folder: Path, rows: Any, optimizer: str = "SGD", **config: Any
    ) -> MemoryHost:
        host = serve(config=config)
        model = new_model()
        made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
        trainer = new_trainer(folder, model, optimizers=(made, None), lr_scheduler_type="constant")
        trainer.train_dataset = rows
        flare.patch(trainer)
        trainer.train()
        return host

    def test_fednova_has_the_rows_for_the_weight_and_any_other_recipe_the_steps(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        meta = self.trained(serve, tmp_path, Examples(), algorithm="fednova").updates[0]["meta"]
        assert (meta["NUM_STEPS_CURRENT_ROUND"], meta["LOCAL_STEPS"]) == (NUM_EXAMPLES, STEPS)
        meta = self.trained(serve, tmp_path, Examples()).updates[0]["meta"]
        assert meta["NUM_STEPS_CURRENT_ROUND"] == STEPS and "LOCAL_STEPS" not in meta

    def test_fednova_refuses_an_optimizer_that_scales_by_the_gradients_and_rows_that_cannot_be_counted(
        self, serve: Callable[..., MemoryHost], tmp_path: Path
    ) -> None:
        with pytest.raises(ClientError, match="AdamW scales its steps by the gradients"):
            self.trained(serve, tmp_path, Examples(), "AdamW", algorithm="fednova")
        with pytest.raises(ClientError, match="a Stream does not say how many it has"):
            self.trained(serve, tmp_path, Stream(), algorithm="fednova")

    @pytest.mark.parametrize("algorithm", ["fednova", "scaffold", "none"])
    def test_without_data_an_update_has_weight_0(
        self, serve: Callable[..., MemoryHost], tmp_path: Path, algorithm: str
    ) -> None:
        nothing = torch.utils.data.Subset(Examples(), [])
        host = self.trained(serve, tmp_path, nothing, algorithm=algorithm)
        assert host.updates[0]["meta"]["NUM_STEPS_CURRENT_ROUND"] == 0
        sent, received = host.params_sent(), new_model().state_dict()
        assert all(torch.equal(sent[name], received[name]) for name in received)
        assert algorithm != "fednova" or host.updates[0]["meta"]["LOCAL_STEPS"] == 0


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows whose number is unknown."""

    def __iter__(self) -> Iterator[Any]:
        rows = Examples()
        yield from (rows[number] for number in range(len(rows)))
