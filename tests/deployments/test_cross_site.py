"""Cross-site and federated evaluation, in real jobs: who scores what, what leaves a hole, what is verified and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpool import Result, Run
from fedpool.flows.verify import verify_job
from fedpool.store import Store

# The model of a site is its number; a model is the better, the nearer it is to that number.
SCRIPT = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    site = int(flare.get_site_name()[-1])
    while flare.is_running():
        model = flare.receive()
        score = 1 / (1 + abs(float(model.params["w"][0]) - site))
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"accuracy": score}, meta={"NUM_STEPS_CURRENT_ROUND": 10 * site}))
        elif flare.is_submit_model():
            flare.send(flare.FLModel(params={"w": np.full(3, site, np.float32)}))
        else:
            params = {"w": model.params["w"] + site}
            flare.send(flare.FLModel(params=params, metrics={"accuracy": score}, meta={"NUM_STEPS_CURRENT_ROUND": site}))
"""
FIELDS: dict[str, Any] = {"cross_site_eval": True, "min_clients": 3, "num_rounds": 2}
THREE = {"num_clients": 3}


def score(value: float, site: int) -> float:
    return 1 / (1 + abs(value - site))


def tasks_of(result: Result) -> list[tuple[str, str]]:
    return [(record["task"], record["model"]["owner"]) for record in result.rounds]


def test_every_model_is_scored_at_every_site_once(run_job: Callable[..., Run], tmp_path: Path) -> None:
    run = run_job(SCRIPT, env=THREE, **FIELDS)
    result = run.get_result()
    assert tasks_of(result) == [
        ("train", "server"),
        ("train", "server"),
        ("evaluate", "server"),
        ("submit_model", "server"),
        ("evaluate", "site-1"),
        ("evaluate", "site-2"),
        ("evaluate", "site-3"),
    ]
    assert verify_job(Store(tmp_path / "runs"), run.job_id).num_rounds == 7
