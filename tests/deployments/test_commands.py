"""The `command` that runs the client script in a simulation, as at a real site: torchrun."""

from collections.abc import Callable
from typing import Any

import pytest

from fedpool import RecipeError, Run, SimEnv

# The usual loop: only rank 0 asks, and broadcasts whether to continue. Each rank adds rank + 1.
DDP_LOOP = """
    import os
    import torch
    import torch.distributed as dist
    import fedpool.client as flare

    if "RANK" not in os.environ:  # the site that runs it as one process
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    flare.init(rank=rank)
    while True:
        running = [flare.is_running() if rank == 0 else None]
        dist.broadcast_object_list(running, src=0)
        if not running[0]:
            break
        model = flare.receive()
        step = torch.tensor(rank + 1.0)
        dist.all_reduce(step)
        if rank == 0:
            print(f"{dist.get_world_size()} ranks")
            flare.send(flare.FLModel(params={"w": model.params["w"] + step}))
    dist.destroy_process_group()
"""
TORCHRUN = "torchrun --nproc-per-node 2"


@pytest.mark.usefixtures("leaves_nothing")
def test_a_ddp_loop_in_which_rank_0_alone_asks_runs_under_torchrun_at_the_sites_that_say_so(
    run_job: Callable[..., Run],
) -> None:
    run = run_job(DDP_LOOP, env={"command": {"site-2": TORCHRUN}})
    assert run.get_result(240).params["w"].tolist() == [4, 4, 4]  # each round adds the mean of 1 and 1 + 2


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("no-such-program --fast", r"no program 'no-such-program' on this machine's PATH"),
        ({"site-1": "no-such-program"}, r"no program 'no-such-program'"),
        ("", r"command is empty: write \"python\""),
        ("torchrun '", r"cannot be split into words"),
    ],
)
def test_a_command_that_cannot_run_is_refused_when_the_environment_is_made(command: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SimEnv(command=command)


def test_a_command_for_a_site_that_is_not_there_is_refused(run_job: Callable[..., Run]) -> None:
    with pytest.raises(RecipeError, match="command names site-3, but the sites are site-1, site-2"):
        run_job(env={"command": {"site-3": TORCHRUN}})
