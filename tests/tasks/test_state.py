"""Stateful strategies and surveying rules, run through the store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool.arrays import load_arrays, save_and_hash
from fedpool.errors import RoundError
from fedpool.flows.fedavg import FedAvg
from fedpool.flows.fedopt import FedOpt
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.aggregate import Aggregated, Before, aggregate
from fedpool.tasks.aggregators import (
    Bulyan,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NormClippedMean,
    TrimmedMean,
)
from fedpool.tasks.gate import Accepted
from fedpool.tasks.optimizers import Adaptive, Momentum, Schedule, TorchOptimizer, make_optimizer
from fedpool.tasks.strategy import Strategy
from tests.updates import sent_by

PATHS = JobPaths("job")
BASE = {
    "a.weight": torch.linspace(-1, 1, 23).reshape(23),
    "b.weight": torch.linspace(0, 2, 10, dtype=torch.float64).reshape(2, 5),
    "bn.running_var": torch.ones(3),
    "bn.num_batches_tracked": torch.tensor(4),
}


class Rounds:
    """Rounds of seven sites, whose updates are determined by the round and the site."""

    def __init__(self, folder: Path, strategy: Strategy, block_elements: int = 1 << 15) -> None:
        self.store = Store(folder)
        self.store.block_elements = block_elements
        self.strategy = strategy
        self.state: Any = None
        with self.store.staged(PATHS.global_model(0)) as file:
            self.size = save_and_hash(file, BASE).size

    def do(
        self, number: int, weights: Sequence[float] = (1, 2, 3, 1, 2, 3, 1), order: Sequence[int] = range(7)
    ) -> Aggregated:
        updates = []
        for site in order:
            rng = np.random.default_rng([number, site])
            params: Mapping[str, Any] = {
                name: value + torch.from_numpy(rng.normal(size=value.shape)).to(value.dtype)
                if value.is_floating_point()
                else value + site
                for name, value in BASE.items()
            }
            params = {name: value.abs() if "var" in name else value for name, value in params.items()}
            with self.store.staged(PATHS.update(number, f"site-{site}")) as file:
                size = save_and_hash(file, params).size
            manifest = sent_by(f"site-{site}", round=number)
            tensors = self.store.tensors(PATHS.update(number, f"site-{site}"), size)
            updates.append(Accepted(manifest, "m" * 64, weights[site], tensors))
        state = None if self.state is None else self.store.tensors(PATHS.state(number - 1), self.state.size)
        found = aggregate(
            self.strategy,
            store=self.store,
            before=Before(self.store.tensors(PATHS.global_model(number), self.size), state, number),
            updates=updates,
            factors={},
            target=PATHS.global_model(number + 1),
            state_target=PATHS.state(number),
        )
        self.size, self.state = found.model.size, found.state
        return found

    def read(self, path: str) -> dict[str, Any]:
        return load_arrays(self.store.full(path), "torch")


ADAM = FedOpt(Mean(), Adaptive("adam", Schedule(0.1), 0.9, 0.99, 1e-3))
STRATEGIES: dict[str, Strategy] = {
    "median": FedAvg(Median()),
    "trimmed_mean": FedAvg(TrimmedMean(trim_ratio=0.2)),
    "krum": FedAvg(Krum(num_byzantine=2)),
    "multi_krum": FedAvg(MultiKrum(num_byzantine=2)),
    "bulyan": FedAvg(Bulyan(num_byzantine=1)),
    "geometric_median": FedAvg(GeometricMedian()),
    "norm_clipped_mean": FedAvg(NormClippedMean(clip_norm=0.5)),
    "adam": ADAM,
    "adam of the median": FedOpt(Median(), Adaptive("adam", Schedule(0.1), 0.9, 0.99, 1e-3)),
    "torch": FedOpt(GeometricMedian(), TorchOptimizer("AdamW", Schedule(0.1))),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_arrival_and_the_size_of_blocks_change_no_bit(name: str, tmp_path: Path) -> None:
    found = []
    for number, (order, block) in enumerate([(range(7), 1 << 15), ([3, 1, 6, 0, 2, 5, 4], 1 << 15), (range(7), 4)]):
        rounds = Rounds(tmp_path / str(number), STRATEGIES[name], block)
        found.append([rounds.do(0, order=order), rounds.do(1, order=order)])
    assert found[0] == found[1] == found[2]


def test_the_state_is_a_slot_for_each_trained_parameter(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, ADAM)
    rounds.do(0)
    state = rounds.read(PATHS.state(0))
    assert {name: (value.dtype, value.shape) for name, value in state.items()} == {
        f"{slot}::{name}": (BASE[name].dtype, BASE[name].shape)
        for slot in ("momentum", "second_moment")
        for name in ("a.weight", "b.weight")
    }
    model = rounds.read(PATHS.global_model(1))
    averaged = Rounds(tmp_path / "mean", FedAvg())
    averaged.do(0)
    mean = averaged.read(PATHS.global_model(1))
    for name in ("bn.running_var", "bn.num_batches_tracked"):
        assert torch.equal(model[name], mean[name])
    assert not torch.equal(model["a.weight"], mean["a.weight"])


def test_a_round_of_empty_sites_leaves_model_and_state_as_they_are(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, ADAM)
    before = rounds.do(0)
    assert rounds.do(1, weights=[0] * 7) == before
    fresh = Rounds(tmp_path / "fresh", ADAM)
    fresh.do(0, weights=[0] * 7)
    assert set(fresh.read(PATHS.state(0))["second_moment::a.weight"].tolist()) == {np.float32(1e-6)}


def test_a_state_that_overflows_fails_the_round(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, FedOpt(Mean(), _Exploding(Schedule(1.0), 0.9)))
    with pytest.raises(RoundError, match=r"the server's momentum::\w\.weight is not finite"):
        rounds.do(0)


class _Exploding(Momentum):
    def step(self, params: Any, delta: Any, slots: Any, round: int) -> Any:
        return params, {"momentum": delta * 1e300}


def test_a_schedule_is_a_function_of_the_round() -> None:
    schedule = Schedule(1.0, "StepLR", {"step_size": 2, "gamma": 0.5})
    assert [schedule.at(round) for round in (5, 0, 2, 4)] == [0.25, 1.0, 0.5, 0.25]
    assert Schedule(0.3).at(100) == 0.3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", {"momentum": 0.9}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {}),
        ("RMSprop", {"momentum": 0.5}),
        ("Adagrad", {}),
    ],
)
def test_optimizers_of_torch_are_what_they_are_in_torch(name: str, arguments: dict[str, Any]) -> None:
    schedule = Schedule(0.1, "ExponentialLR", {"gamma": 0.5})
    ours = make_optimizer(f"torch.optim.{name}", schedule, beta1=0.9, beta2=0.99, tau=1e-3, arguments=arguments)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    theirs = getattr(torch.optim, name)([parameter], lr=0.1, **arguments)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5)
    params = parameter.detach().clone()
    slots: Mapping[str, torch.Tensor] = {slot: torch.full_like(params, value) for slot, value in ours.slots.items()}
    for round in range(5):
        delta = torch.tensor([0.5, -1.0], dtype=torch.float64) * (round + 1)
        params, slots = ours.step(params, delta, slots, round)
        parameter.grad = -delta
        theirs.step()
        scheduler.step()
    assert torch.equal(params, parameter.detach())
