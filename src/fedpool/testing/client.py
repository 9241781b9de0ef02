"""A client script that misbehaves according to a plan. Use it as `train_script`::

    plan = {"site-2": {"1": "nan"}}
    FedAvgRecipe(..., train_script=MISBEHAVING_CLIENT, train_args=[json.dumps(plan)])

Sites and rounds are strings. If the plan has nothing for them, the script adds 1 to each parameter.
"""

import json
import os
import signal
import sys
import threading
from typing import Any

import fedpool.client as flare


def misbehave(how: str, params: dict[str, Any]) -> dict[str, Any]:
    """Misbehave as planned with the parameters to send; returns those that are sent."""
    first = min(params)
    match how:
        case "raise":
            raise RuntimeError("the client raises, as planned")
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            threading.Event().wait()
        case "flood":
            sys.stdout.write("by plan\n" * 1_250_000)
        case "nan":
            return {**params, first: params[first] * float("nan")}
        case "shape":
            return {**params, first: params[first][None]}
        case "rename":
            return {f"{name}x": value for name, value in params.items()}
        case "huge":
            return {**params, first: params[first] * 0 + 1e30}
        case _:
            raise ValueError(f"the plan has {how!r}, which is not one of {', '.join(KINDS)}")
    return params


KINDS = ("raise", "exit", "kill", "hang", "flood", "nan", "shape", "rename", "huge")


def main() -> None:
    """Train until the job ends."""
    plan = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    flare.init()
    while flare.is_running():
        model = flare.receive()
        assert model is not None and model.params is not None, "receive() without a time limit returns a model"
        params = {name: value + 1 for name, value in model.params.items()}
        how = plan.get(flare.get_site_name(), {}).get(str(model.current_round))
        flare.send(flare.FLModel(params=misbehave(how, params) if how else params))


if __name__ == "__main__":
    main()
