"""What algorithms ask of a local loop, against the papers' formulas written out."""

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
    """Makes this process a client whose every round starts from START, with the server's control variate THEIRS."""
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


@pytest.mark.parametrize(("momentum", "wanted"), [(0.0, 4.0), (0.5, 1 + 1.5 + 1.75 + 1.875)])
def test_local_steps_are_the_l1_norm_of_how_much_each_gradient_counts(momentum: float, wanted: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum)
    steps = flare.LocalSteps(optimizer)
    for _ in range(4):
        parameter.grad = torch.ones(1)
        optimizer.step()
    assert steps.close() == steps.count == wanted
    assert -parameter.item() == wanted  # by definition: gradients of 1 move it so far
    optimizer.step()
    assert steps.count == wanted


def test_scaffold_does_what_the_paper_says_over_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Karimireddy et al. 2020, algorithm 1, lines 10 to 13, option II; the learning rate changes from step to step."""
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


def test_without_a_step_there_is_nothing_to_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(tmp_path, 1, monkeypatch)
    flare.receive()
    model = nn.Linear(2, 1, bias=False)
    control = flare.Scaffold(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ClientError, match="took no step of 'weight'"):
        control.extras()


def test_after_the_job_there_is_no_round_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flare, "_client", Client(MemoryHost(tmp_path, []), "torch"))
    model: Any = nn.Linear(2, 1)
    with pytest.raises(ClientError, match="belongs into a round"):
        flare.Scaffold(model, torch.optim.SGD(model.parameters(), lr=0.1))
