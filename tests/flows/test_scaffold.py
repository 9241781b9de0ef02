"""SCAFFOLD over whole jobs: the server's control variate is the mean of the sites' variates,
whatever happens to their updates.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import Run, ScaffoldRecipe
from fedpool.arrays import load_arrays
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store

SCRIPT = """
    import torch
    import fedpool.client as flare

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    flare.init()
    site = int(flare.get_site_name().split("-")[1])
    optimum = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(site))
    curvature = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(site + 100)) + 0.5
    weights = {weights}
    while flare.is_running():
        model = Net()
        received = flare.receive()
        model.load_state_dict(received.params)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        control = flare.Scaffold(model, optimizer)
        for _ in range(5 if weights[site - 1] else 0):
            optimizer.zero_grad()
            (curvature * (model.w - optimum).square() / 2).sum().backward()
            optimizer.step()
        params = model.state_dict()
        extras = control.extras()
        if (site, received.current_round) in {broken}:
            params = {{"w": params["w"] * float("nan")}}
        flare.send(flare.FLModel(params=params, extras=extras, meta={{"NUM_STEPS_CURRENT_ROUND": weights[site - 1]}}))
"""


def variates(run: Run) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]], dict[str, float]]:
    """The server's control variate at the end of the job, the sites' variates from the updates that
    counted, and the sites' first weights.
    """
    store, paths = Store(Path(run.path).parent), JobPaths(run.job_id)
    records = [record for record in run.get_result().rounds if record["task"] == "train"]
    own = {site: np.zeros(3) for site in store.read_json(paths.job)["sites"]}
    weights: dict[str, float] = {}
    for record in records:
        for entry in record["accepted"]:
            site, number = entry["site"], record["round"]
            weights[site] = weights.get(site) or entry["weight"]
            if entry["weight"]:
                sent = load_arrays(store.full(paths.update(number, site, entry["attempt"])), "numpy")
                own[site] += entry.get("scale", 1.0) * sent["control::w"]
    last = load_arrays(store.full(paths.state(len(records) - 1)), "numpy")
    for site, variate in own.items():  # what the site itself keeps; it can't know yet if its last update counted
        kept = sorted(Path(store.full(paths.kept(site))).glob("*/control.safetensors"))
        if kept and int(kept[-1].parent.name) == len(records) - 1:
            found = load_arrays(kept[-1], "numpy")
            counted = any(entry["site"] == site and entry["weight"] for entry in records[-1]["accepted"])
            scale = next((e.get("scale", 1.0) for e in records[-1]["accepted"] if e["site"] == site), 1.0)
            mine = found["before::w"] + counted * scale * (found["w"] - found["before::w"])
            np.testing.assert_allclose(mine, variate, rtol=0, atol=1e-12)
    verify_job(store, run.job_id)
    return last["control::w"], own, weights


@pytest.mark.parametrize("weighted", [True, False])
def test_c_is_the_mean_of_the_sites_with_over_sampling_a_rejected_site_and_one_of_weight_0(
    weighted: bool, run_job: Callable[..., Run]
) -> None:
    run = run_job(
        SCRIPT.format(weights=[9, 1, 2, 0, 3, 4], broken={(1, 1), (2, 2), (1, 4), (3, 3)}),
        kind=ScaffoldRecipe,
        env={"num_clients": 6},
        model={"w": np.zeros(3)},
        num_rounds=12,
        min_clients=2,
        clients_per_round=4,
        over_sample=1,
        max_update_norm=0.4,
        clip_updates=True,
        weighted=weighted,
    )
    c, own, weights = variates(run)
    records = run.get_result().rounds
    assert any(record["rejected"] for record in records) and any(record["late"] for record in records)
    assert any(entry["weight"] == 0 for record in records for entry in record["accepted"])
    assert any(entry["scale"] < 1 for record in records for entry in record["accepted"])
    assert weights.keys() == own.keys()
    shares = weights if weighted else dict.fromkeys(own, 1.0)
    wanted = sum(shares[site] * own[site] for site in own) / sum(shares.values())
    np.testing.assert_allclose(c, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("weighted", "shares"), [(True, [9, 1]), (False, [1, 1])])
def test_it_comes_to_the_optimum_of_the_objective_that_it_says(
    weighted: bool, shares: list[float], run_job: Callable[..., Run]
) -> None:
    import torch

    run = run_job(
        SCRIPT.format(weights=[9, 1], broken=set()),
        kind=ScaffoldRecipe,
        model={"w": np.zeros(3)},
        num_rounds=20,
        weighted=weighted,
    )
    generator = torch.Generator()
    optima = [torch.randn(3, dtype=torch.float64, generator=generator.manual_seed(site)) for site in (1, 2)]
    curved = [torch.rand(3, dtype=torch.float64, generator=generator.manual_seed(site + 100)) + 0.5 for site in (1, 2)]
    weights = [share * curvature for share, curvature in zip(shares, curved, strict=True)]
    wanted = (weights[0] * optima[0] + weights[1] * optima[1]) / (weights[0] + weights[1])
    np.testing.assert_allclose(run.get_result().params["w"].numpy(), wanted.numpy(), atol=1e-4)
