"""Scripts that read and fill `meta`, as those written for NVFlare do, in real jobs."""

from collections.abc import Callable
from typing import Any

import torch

from fedpool import FedProxRecipe, Run, ScaffoldRecipe

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))

HEAD = """
    import torch
    import fedpool.client as flare

    flare.init()
    site = flare.system_info()["site_index"]
    generator = torch.Generator().manual_seed(site)
    inputs, labels = torch.randn(32, 4, generator=generator) + site, torch.randint(0, 2, (32,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))

    def step(optimizer, more=0.0):
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(model(inputs), labels) + more).backward()
        optimizer.step()
"""

# This script never asks for its task: it also trains in the evaluation, and must find everything
# that it reads there too.
BY_META = """
    from fedpool.client.scaffold_helper import PTScaffoldHelper
    helper = None
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        if helper is None:
            helper = PTScaffoldHelper()
            helper.init(model)
        assert set(received.meta["scaffold_c_global"]) == set(received.params)
        helper.load_global_controls(received.meta["scaffold_c_global"])
        theirs, ours = helper.get_params()
        before = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        before.load_state_dict(received.params)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(optimizer)
            helper.model_update(model, 0.1, theirs, ours)
        helper.terms_update(model, 0.1, theirs, ours, before)
        meta = {"NUM_STEPS_CURRENT_ROUND": 3, "scaffold_c_diff": helper.get_delta_controls()}
        flare.send(flare.FLModel(params=model.state_dict(), metrics={"accuracy": 0.5}, meta=meta))
"""

BY_EXTRAS = """
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"accuracy": 0.5}))
            continue
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        control = flare.Scaffold(model, optimizer)
        for _ in range(3):
            step(optimizer)
        update = flare.FLModel(params=model.state_dict(), metrics={"accuracy": 0.5}, extras=control.extras())
        update.meta["NUM_STEPS_CURRENT_ROUND"] = 3
        flare.send(update)
"""


def final(run: Run) -> dict[str, Any]:
    result = run.get_result()
    assert result.evaluation_error is None
    return result.params


def test_scaffold_by_meta_comes_to_what_it_comes_to_by_extras(run_job: Callable[..., Run]) -> None:
    common: dict[str, Any] = {"kind": ScaffoldRecipe, "model": MODEL, "num_rounds": 3}
    by_meta, by_extras = final(run_job(HEAD + BY_META, **common)), final(run_job(HEAD + BY_EXTRAS, **common))
    for name, value in by_extras.items():
        try:
            torch.testing.assert_close(by_meta[name], value, rtol=1e-5, atol=1e-6)
        except AssertionError as error:
            error.add_note(f"in {name}")
            raise
    assert not torch.equal(by_extras["0.weight"], MODEL.state_dict()["0.weight"])


def test_a_script_reads_the_mu_of_fedprox_from_meta(run_job: Callable[..., Run]) -> None:
    loop = """
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        mu = SOURCE
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(optimizer, flare.prox_loss(model, received.params, mu))
        flare.send(flare.FLModel(params=model.state_dict()))
"""
    runs = [
        run_job(HEAD + loop.replace("SOURCE", source), kind=FedProxRecipe, model=MODEL, fedprox_mu=0.5)
        for source in ('received.meta["fedprox_mu"]', 'flare.get_config()["fedprox_mu"]', "0.0")
    ]
    by_meta, by_config, without = (final(run) for run in runs)
    assert all(torch.equal(by_meta[name], by_config[name]) for name in by_meta)
    assert not torch.equal(by_meta["0.weight"], without["0.weight"])


def test_a_script_reads_which_model_it_is_to_submit_from_meta(run_job: Callable[..., Run]) -> None:
    loop = """
    while flare.is_running():
        received = flare.receive()
        if flare.is_submit_model():
            if received.meta["submit_model_name"] != "best_model":
                raise ValueError(received.meta)
            flare.send(flare.FLModel(params=model.state_dict()))
        elif flare.is_evaluate():
            assert received.meta["validate_type"] == "model_validate"
            assert received.meta["current_round"] == received.current_round < received.total_rounds
            flare.send(flare.FLModel(metrics={"accuracy": 0.5}, meta=received.meta))
        else:
            model.load_state_dict(received.params)
            step(torch.optim.SGD(model.parameters(), lr=0.1))
            flare.send(flare.FLModel(params=model.state_dict(), metrics={"accuracy": 0.5}))
"""
    result = run_job(HEAD + loop, model=MODEL, cross_site_eval=True).get_result()
    assert result.cross_site is not None
    assert set(result.cross_site["site-2"]) >= {"server", "site-1", "site-2"}
