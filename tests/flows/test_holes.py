"""Whole jobs with an attention mask, whose buffer holds -inf by design. Infinity or NaN that can't
be intended is reported when the recipe is built.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool import FedAvgRecipe, FedOptRecipe, IntegrityError, Recipe, RecipeError, Run, ScaffoldRecipe
from fedpool.flows.replay import replay_round
from fedpool.flows.verify import verify_job
from fedpool.store import Store

SCRIPT = """
    import torch
    import fedpool.client as flare

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 1)
            self.register_buffer("mask", torch.triu(torch.full((3, 3), float("-inf")), 1))

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    flare.init()
    while flare.is_running():
        model = flare.receive()
        net.load_state_dict(model.params)
        control = {control}
        optimizer.zero_grad()
        net.fc(torch.ones(4, 2)).square().sum().backward()
        optimizer.step()
        flare.send(flare.FLModel(params=net.state_dict(), extras=control.extras() if control else {{}}))
"""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)
        self.mask: torch.Tensor
        self.register_buffer("mask", torch.triu(torch.full((3, 3), float("-inf")), 1))


def place(run: Run) -> tuple[Store, str]:
    return Store(Path(run.path).parent), run.job_id


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (FedAvgRecipe, {}),
        (FedAvgRecipe, {"params_transfer_type": "DIFF", "max_update_norm": 0.1, "clip_updates": True}),
        (FedOptRecipe, {}),
        (ScaffoldRecipe, {}),
    ],
    ids=["full", "diff", "fedopt", "scaffold"],
)
def test_a_mask_of_minus_infinity_goes_through_a_job_as_it_is(
    kind: type[Recipe], fields: dict[str, Any], run_job: Callable[..., Run], tmp_path: Path
) -> None:
    net = Net()
    script = SCRIPT.format(control="flare.Scaffold(net, optimizer)" if kind is ScaffoldRecipe else "None")
    run = run_job(script, kind=kind, model=net, num_rounds=3, **fields)
    result = run.get_result()
    assert [len(record["accepted"]) for record in result.rounds] == [2, 2, 2]
    assert torch.equal(result.params["mask"], net.mask)
    assert not torch.equal(result.params["fc.weight"], net.fc.weight)
    store, job_id = place(run)
    assert store.read_json(f"{job_id}/job.json")["holes"] == ["mask"]
    assert verify_job(store, job_id).num_updates == 6
    assert replay_round(store, job_id, tmp_path / "model.safetensors", strategy="median").distance < 1


def test_holes_that_a_model_has_not_are_found_out(run_job: Callable[..., Run]) -> None:
    run = run_job(num_rounds=1)
    store, job_id = place(run)
    path = Path(run.path) / "job.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"holes": ["w"]}))
    with pytest.raises(IntegrityError, match=r"job\.json says holes \['w'\], but it should be \[\]"):
        verify_job(store, job_id)


@pytest.fixture
def fields(write_script: Callable[..., Path]) -> dict[str, Any]:
    return {"name": "n", "train_script": write_script("pass"), "min_clients": 1, "num_rounds": 1}


def test_infinity_in_a_parameter_that_is_trained_is_told_when_the_recipe_is_built(fields: dict[str, Any]) -> None:
    net = Net()
    with torch.no_grad():
        net.fc.weight[0, 1] = float("inf")
    with pytest.raises(RecipeError, match=r"model: fc\.weight holds infinity and is trained: give finite values, or"):
        FedAvgRecipe(**fields, model=net)
    net.fc.weight.requires_grad_(False)  # if frozen, it may be intended
    assert FedAvgRecipe(**fields, model=net).model.holes == {"fc.weight", "mask"}


@pytest.mark.parametrize(
    "model", [{"w": np.array([1.0, np.nan])}, {"w": torch.tensor([float("nan")]).to(torch.bfloat16)}]
)
def test_nan_is_told_when_the_recipe_is_built_unless_it_stays_at_the_sites(model: Any, fields: dict[str, Any]) -> None:
    model["b"] = np.zeros(1)
    with pytest.raises(RecipeError, match=r"model: w holds NaN: give finite values, or .* exclude_vars='\^w\$'"):
        FedAvgRecipe(**fields, model=model)
    FedAvgRecipe(**fields, model=model, exclude_vars="^w$")
