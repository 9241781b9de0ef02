"""A strategy's failures and wrong results are errors that name its class, and nothing is stored."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool import FedAvgRecipe, RecipeError, SimEnv
from fedpool.errors import RoundError
from fedpool.flows.fedavg import FedAvg
from fedpool.paths import JobPaths
from fedpool.tasks.aggregators import Mean
from fedpool.tasks.guarded import check_chosen
from fedpool.tasks.strategy import State, Strategy, Update
from tests.tasks.test_aggregate import Round, f32

PATHS = JobPaths("job-1")
Apply = Callable[[State, Sequence[Update]], Any]


@dataclass(frozen=True)
class Own(Strategy):
    """A strategy whose `apply` is the test's."""

    how: Apply
    has: tuple[str, ...] = ()

    @property
    def slots(self) -> Mapping[str, float]:
        return dict.fromkeys(self.has, 0.0)

    def apply(self, state: State, updates: Sequence[Update]) -> State:
        made: State = self.how(state, updates)
        return made


class Begins(FedAvg):
    """A strategy whose `init` forgets to return its state."""

    slots = {"m": 0.0}  # noqa: RUF012

    def init(self, params: Any, averaged: frozenset[str] = frozenset()) -> Any:
        pass


def result(folder: Path, strategy: Strategy) -> None:
    round = Round(folder, {"w": f32(0, 0, 0)})
    round.send("site-1", {"w": f32(1, 2, 3)})
    try:
        round.aggregate(strategy=strategy)
    finally:
        assert not round.store.exists(PATHS.global_model(1)) and not round.store.exists(PATHS.state(0))


def leaves(state: State, updates: Sequence[Update]) -> Any:
    raise SystemExit(3)


def is_cancelled(state: State, updates: Sequence[Update]) -> Any:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (lambda state, updates: state.after({"v": state.params["w"]}), r"returned params \[v\]: it must map the names"),
        (
            lambda state, updates: state.after({"w": torch.zeros(2)}),
            r"shape \[2\] in params, but it has to be \[3\]: return",
        ),
        (
            lambda state, updates: state.after({"w": torch.zeros(1, 3)}),
            r"shape \[1, 3\] in params, but it has to be \[3\]",
        ),
        (lambda state, updates: state.after({"w": [0.0] * 3}), "returned a list in params: return a float64 tensor"),
        (lambda state, updates: state.after(None), "returned params None: it must map the names"),
        (
            lambda state, updates: state.after({"w": state.params["w"] / 0}),
            "returned NaN or infinity in params, although",
        ),
        (lambda state, updates: None, r"returned None: return a State, such as state\.after\("),
        (
            lambda state, updates: state.after(state.params, {"m": state.params}),
            r"the slots \[m\], but the class has none: name them in slots",
        ),
        (lambda state, updates: state.params["v"], r"KeyError: 'v' \(.*test_guarded\.py, line \d+\)"),
        (leaves, r"SystemExit: 3 \(.*test_guarded\.py, line \d+\)"),
        (is_cancelled, r"CancelledError \(.*test_guarded\.py, line \d+\)"),
    ],
)
def test_what_apply_does_wrong_is_said_with_its_class_and_the_parameter(
    tmp_path: Path, apply: Apply, words: str
) -> None:
    with pytest.raises(RoundError, match=rf"^Own\.apply (failed )?at parameter w: .*{words}"):
        result(tmp_path, Own(apply))


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({"m": {"w": torch.zeros(2)}}, r"a tensor of shape \[2\] in slots\['m'\], but it has to be \[3\]"),
        ({"m": {"w": torch.full((3,), torch.nan)}}, r"NaN or infinity in slots\['m'\]"),
        ({"m": {}}, r"slots\['m'\] \[\]: it must map"),
        ({}, r"the slots \[\]: the class has \[m\]"),
        ({"m": {"w": torch.zeros(3)}, "v": {"w": torch.zeros(3)}}, r"the slots \[m, v\]: the class has \[m\]"),
    ],
)
def test_a_slot_that_does_not_fit_is_not_stored(tmp_path: Path, slots: Any, words: str) -> None:
    with pytest.raises(RoundError, match=rf"^Own\.apply at parameter w: it returned .*{words}"):
        result(tmp_path, Own(lambda state, updates: state.after(state.params, slots), ("m",)))


def test_an_init_that_returns_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RoundError, match=r"^Begins\.init at parameter w: it returned None: return a State"):
        result(tmp_path, Begins(Mean()))


@pytest.mark.parametrize("chosen", [None, "site-1", ("site-9",), ("site-1", "site-1")])
def test_a_choice_of_other_sites_is_named(chosen: Any) -> None:
    with pytest.raises(
        RoundError, match=r"FedAvg\.choose returned .*: return some of the sites that it got, each once"
    ):
        check_chosen(FedAvg(Mean()), chosen, ("site-1", "site-2"))


class NothingRecipe(FedAvgRecipe):
    def strategy(self, num_sites: int) -> Any:
        pass


class FailingRecipe(FedAvgRecipe):
    def strategy(self, num_sites: int) -> Any:
        raise SystemExit(f"{num_sites} sites are too few")


class OneNameRecipe(FedAvgRecipe):
    def strategy(self, num_sites: int) -> Any:
        class OneName(FedAvg):
            extras = "control"  # type: ignore[assignment]

        return OneName(Mean())


class NoValueRecipe(FedAvgRecipe):
    def strategy(self, num_sites: int) -> Any:
        class NoValue(FedAvg):
            slots = ("momentum",)  # type: ignore[assignment]

        return NoValue(Mean())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OneNameRecipe, r"OneName\.extras is 'control': give a tuple of names without '::', such as \('control',\)"),
        (
            NoValueRecipe,
            r"NoValue\.slots is \('momentum',\): give the initial value of each, such as \{'momentum': 0\.0\}",
        ),
        (NothingRecipe, r"NothingRecipe\.strategy returned None: return an instance of a subclass of Strategy"),
        (FailingRecipe, r"FailingRecipe\.strategy\(2\) failed: SystemExit: 2 sites are too few \(.*line \d+\)"),
    ],
)
def test_a_recipe_without_a_strategy_is_refused_before_anything_starts(
    tmp_path: Path, kind: type[FedAvgRecipe], words: str
) -> None:
    script = tmp_path / "client.py"
    script.write_text("import fedpool.client\n")
    recipe = kind(name="job", min_clients=2, num_rounds=1, model={"w": np.zeros(3)}, train_script=str(script))
    with pytest.raises(RecipeError, match=words):
        recipe.execute(SimEnv(workspace=tmp_path / "jobs", progress=False))
    assert not (tmp_path / "jobs").exists()
