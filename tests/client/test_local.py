"""What algorithms need from a local training loop, checked against the papers' formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedpool.client as flare
from fedpool.arrays import load_arrays, save_and_hash
from fedpool.client.api import Client
from fedpool.errors import ClientError
from fedpool.tensors import beside
from tests.hosts import MemoryHost, host_of

START = {"weight": torch.tensor([[1.0, -2.0]])}
THEIRS = torch.tensor([[0.25, -0.5]])


def served(folder: Path, num_rounds: int, monkeypatch: pytest.MonkeyPatch) -> MemoryHost:
    """Makes this process a client whose rounds all start from START, with the server's control
    variate THEIRS.
    """
    from dataclasses import replace

    with (folder / "state").open("wb") as file:
        save_and_hash(file, {beside("control", "weight"): THEIRS})
    host = host_of(folder, *[START] * num_rounds)
    host.plan = [assignment and replace(assignment, extras=str(folder / "state")) for assignment in host.plan]
    monkeypatch.setattr(flare, "_client", Client(host, "torch"))
    return host


def test_the_proximal_term_is_half_mu_times_the_squared_distance() -> None:
    model = nn.Linear(3, 2)
    anchor = {name: value.detach().clone() - 2 for name, value in model.named_parameters()}
    loss = flare.prox_loss(model, anchor, 0.5)
    assert loss.item() == pytest.approx(0.5 / 2 * 8 * 2**2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(model.weight.grad, torch.full((2, 3), 0.5 * 2))  # type: ignore[arg-type]


def test_the_proximal_term_takes_numpy_and_leaves_out_what_is_not_trained() -> None:
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    anchor = {name: value.detach().numpy() - 3 for name, value in model.named_parameters()} | {"more": np.zeros(1)}
    assert flare.prox_loss(model, anchor, 2.0).item() == pytest.approx(9.0)


def test_a_parameter_that_the_global_model_lacks_is_named() -> None:
    with pytest.raises(ClientError, match="the global model has no parameter 'weight': w"):
        flare.prox_loss(nn.Linear(1, 1), {"w": torch.zeros(1)}, 1.0)


def reach(settings: dict[str, Any], rates: list[float]) -> float:
    """Sum over the gradients of how far each one alone moves a parameter, in units of the first
    rate, by torch's formulas.
    """
    lr, momentum, decay = rates[0], settings.get("momentum", 0.0), settings.get("weight_decay", 0.0)
    total = 0.0
    for pushed in range(len(rates)):
        x, buffer = 0.0, None
        for number, rate in enumerate(rates):
            gradient = float(number == pushed) + decay * x
            if momentum:
                keep = 1 - settings.get("dampening", 0.0)
                buffer = gradient if buffer is None else momentum * buffer + keep * gradient
                gradient = gradient + momentum * buffer if settings.get("nesterov") else buffer
            x -= rate * gradient
        total += abs(x)
    return total / lr


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"weight_decay": 0.1},
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_local_steps_count_by_the_optimizers_own_update(settings: dict[str, Any], factor: float) -> None:
    """Wang et al. 2020, section 4, computed gradient by gradient, for a constant and a falling
    rate.
    """
    parameter = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, **settings)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
    steps, rates = flare.LocalSteps(optimizer), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.randn(3)
        optimizer.step()
        scheduler.step()
    assert steps.close() == pytest.approx(reach(settings, rates), rel=1e-9)
    known = {"{}": 10, "{'momentum': 0.9}": 41.381059609, "{'momentum': 0.9, 'nesterov': True}": 47.2429536481}
    assert factor != 1.0 or steps.count == known.get(str(settings), steps.count)
    if not settings and factor == 0.5:
        assert steps.count == pytest.approx(2.0, abs=0.01)


def test_local_steps_of_groups_that_differ_are_the_mean_of_their_elements() -> None:
    slow, fast = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [{"params": [slow]}, {"params": [fast], "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(4))], lr=0.1)
    steps, both = flare.LocalSteps(optimizer), flare.LocalSteps(optimizer, other)
    for _ in range(10):
        slow.grad, fast.grad = torch.ones(3), torch.ones(1)
        optimizer.step()
        other.step()
    assert steps.close() == pytest.approx((3 * 10 + 41.381059609) / 4)
    assert both.close() == pytest.approx((3 * 10 + 41.381059609 + 4 * 10) / 8)


def test_what_momentum_brings_along_from_the_round_before_is_not_this_rounds() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, dampening=0.5)
    counts = []
    for _ in range(2):
        steps = flare.LocalSteps(optimizer)
        for _ in range(10):
            parameter.grad = torch.ones(1)
            optimizer.step()
        counts.append(steps.close())
    # Only the very first gradient is not dampened.
    assert counts == [pytest.approx(23.947137604), pytest.approx(41.381059609 / 2)]


def test_a_schedule_that_begins_at_0_counts_in_steps_of_its_full_rate() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    steps = flare.LocalSteps(optimizer)
    for _ in range(6):
        parameter.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert steps.close() == pytest.approx(0 + 0.25 + 0.5 + 0.75 + 1 + 1)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "Rprop", "LBFGS", "Muon"])
def test_an_optimizer_without_such_a_norm_is_refused(name: str) -> None:
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.randn(2, 2))], lr=0.1)
    with pytest.raises(ClientError, match=rf"FedNova .*{name}.*Use torch\.optim\.SGD"):
        flare.LocalSteps(optimizer)


@pytest.mark.parametrize(("momentum", "wanted"), [(0.0, 4.0), (0.5, 1 + 1.5 + 1.75 + 1.875)])
def test_local_steps_are_the_l1_norm_of_how_much_each_gradient_counts(momentum: float, wanted: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum)
    steps = flare.LocalSteps(optimizer)
    for _ in range(4):
        parameter.grad = torch.ones(1)
        optimizer.step()
    assert steps.close() == steps.count == wanted
    assert -parameter.item() == wanted  # by definition: gradients of 1 move it this far
    optimizer.step()
    assert steps.count == wanted


def test_scaffold_does_what_the_paper_says_over_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Karimireddy et al. 2020, algorithm 1, lines 10 to 13, option II; the learning rate changes
    from step to step.
    """
    host = served(tmp_path, 3, monkeypatch)
    gradients = torch.randn(3, 4, 1, 2, generator=torch.Generator().manual_seed(0))
    rates = [0.1, 0.05, 0.2, 0.1]
    ours = torch.zeros(1, 2)
    for number in range(3):
        model = nn.Linear(2, 1, bias=False)
        received = flare.receive()
        assert received is not None and received.params is not None
        model.load_state_dict(received.params)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        control = flare.Scaffold(model, optimizer)
        y = START["weight"].clone()
        for gradient, rate in zip(gradients[number], rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            model.weight.grad = gradient.clone()
            optimizer.step()
            y = y - rate * (gradient + THEIRS - ours)
        assert torch.allclose(model.weight, y, atol=1e-6)
        after = ours - THEIRS + (START["weight"] - y) / sum(rates)
        extras = control.extras()
        assert torch.allclose(extras["control"]["weight"], after - ours, atol=1e-6)
        flare.send(flare.FLModel(params=model.state_dict(), extras=extras))
        sent = load_arrays(tmp_path / f"update-{number}", "torch")
        assert sorted(sent) == ["control::weight", "weight"] and host.updates[number]["num_params"] == 1
        ours = after


def test_what_is_not_trained_has_a_variate_of_0_and_statistics_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(tmp_path, 1, monkeypatch)
    flare.receive()
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    control = flare.Scaffold(model, optimizer)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    extras = control.extras()["control"]
    assert sorted(extras) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert not extras["0.bias"].any()


def test_a_site_without_data_changes_nothing_and_has_weight_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = served(tmp_path, 1, monkeypatch)
    flare.receive()
    model = nn.Linear(2, 1, bias=False)
    control = flare.Scaffold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    extras = control.extras()
    assert not extras["control"]["weight"].any()
    flare.send(flare.FLModel(params=model.state_dict(), extras=extras, meta={"NUM_STEPS_CURRENT_ROUND": 7}))
    assert host.updates[0]["meta"]["NUM_STEPS_CURRENT_ROUND"] == 0


def test_a_model_that_other_optimizers_have_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(tmp_path, 1, monkeypatch)
    flare.receive()
    model, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1)
    control = flare.Scaffold(model, torch.optim.SGD(other.parameters(), lr=0.1))
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(ClientError, match="'weight' has changed, but no optimizer given to Scaffold"):
        control.extras()


def used(round: int, attempt: int = 0, scale: float = 1.0) -> dict[str, Any]:
    return {"round": round, "attempt": attempt, "scale": scale}


def test_a_variate_holds_only_if_its_update_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 0 counts, scaled by one half; round 1 does not; round 2 is asked twice, and its first
    attempt counts; rounds 3 and 4 do not.
    """
    from dataclasses import replace

    told = [used(-1), used(0, scale=0.5), used(0, scale=0.5), used(0, scale=0.5), used(2), used(2), used(2)]
    rounds = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (5, 0)]
    host = served(tmp_path, len(rounds), monkeypatch)
    host.plan = [
        planned and replace(planned, round=number, attempt=attempt, used=known)
        for planned, (number, attempt), known in zip(host.plan, rounds, told, strict=True)
    ]
    found, changes = [], []
    for rate in range(1, len(rounds) + 1):
        received = flare.receive()
        assert received is not None and received.params is not None
        model = nn.Linear(2, 1, bias=False)
        model.load_state_dict(received.params)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        control = flare.Scaffold(model, optimizer)
        found.append(control._ours["weight"].clone())
        model.weight.grad = torch.full((1, 2), float(rate))
        optimizer.step()
        extras = control.extras()
        changes.append(extras["control"]["weight"])
        flare.send(flare.FLModel(params=model.state_dict(), extras=extras))
    after_0 = 0.5 * changes[0]
    after_2 = after_0 + changes[2]
    for mine, wanted in zip(found, [0 * after_0, after_0, after_0, after_0, after_2, after_2, after_2], strict=True):
        assert torch.allclose(mine, wanted, atol=1e-6)
    left = sorted(path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*.safetensors"))
    assert left == ["00002/control.safetensors", "00002/control@1.safetensors", "00005/control.safetensors"]


@pytest.mark.parametrize("earlier", [True, False], ids=["an earlier version", "this version"])
def test_what_an_earlier_version_kept_in_a_second_attempt_is_found(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version had one file for all attempts of a round; this version takes that file as
    the first attempt's, which did not count.
    """
    from dataclasses import replace

    host = served(tmp_path, 1, monkeypatch)
    host.plan = [planned and replace(planned, round=5, used=used(4, attempt=1)) for planned in host.plan]
    (tmp_path / "kept" / "00004").mkdir(parents=True)
    variate = {"weight": torch.full((1, 2), 7.0)}
    with (tmp_path / "kept" / "00004" / "control.safetensors").open("wb") as file:
        save_and_hash(file, variate if earlier else variate | {beside("before", "weight"): torch.zeros(1, 2)})
    flare.receive()
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if earlier:
        assert flare.Scaffold(model, optimizer)._ours["weight"].tolist() == [[7.0, 7.0]]
    else:
        with pytest.warns(UserWarning, match="are gone"):
            assert flare.Scaffold(model, optimizer)._ours["weight"].tolist() == [[0.0, 0.0]]


def test_what_is_gone_though_it_counted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    host = served(tmp_path, 1, monkeypatch)
    host.plan = [planned and replace(planned, round=5, used=used(4)) for planned in host.plan]
    flare.receive()
    model = nn.Linear(2, 1, bias=False)
    with pytest.warns(UserWarning, match="kept as 'control' with its update of round 4 are gone"):
        flare.Scaffold(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_after_the_job_there_is_no_round_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flare, "_client", Client(MemoryHost(tmp_path, []), "torch"))
    model: Any = nn.Linear(2, 1)
    with pytest.raises(ClientError, match="was made outside a round"):
        flare.Scaffold(model, torch.optim.SGD(model.parameters(), lr=0.1))
