"""What a script knows, and what happens when one fails, at sites in their own processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedpool import FedAvgRecipe, PocEnv, SimEnv
from fedpool.cli import main
from fedpool.deployments.endings import read_endings
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.job_record import JobResult
from tests.poc import processes_of, wait_until, wait_until_gone

pytestmark = pytest.mark.slow

# Each site changes the model by what it knows about itself; site-2 fails after its last round.
SCRIPT = """
import sys
import numpy as np
import fedpool.client as flare

flare.init()
who = flare.system_info()
while flare.is_running():
    received = flare.receive()
    assert received.current_round < received.total_rounds and received.meta["site_name"] == who["site_name"]
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"accuracy": 0.5}, meta={"NUM_EVAL_EXAMPLES": 10 + who["site_index"]}))
        continue
    step = flare.get_config()["step"] * (who["site_index"] + 1) / who["num_sites"]
    params = {"w": received.params["w"] + np.float32(step)}
    flare.send(flare.FLModel(params=params, metrics={"accuracy": 0.25}, meta={"NUM_STEPS_CURRENT_ROUND": 3}))
if who["site_name"] == "site-2":
    sys.exit(3)
"""


@pytest.fixture
def env(tmp_path: Path) -> Iterator[PocEnv]:
    env = PocEnv(num_clients=2, home=tmp_path / "poc", progress=False)
    try:
        env.up()
        yield env
    finally:
        env.down()
        wait_until_gone(processes_of, tmp_path / "poc")


def test_scripts_know_the_same_as_in_simulation_and_the_last_one_is_named_that_failed(
    env: PocEnv, prefect_api: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "client.py").write_text(SCRIPT)
    recipe = FedAvgRecipe(
        name="known",
        min_clients=2,
        num_rounds=2,
        model={"w": np.zeros(3, np.float32)},
        train_script=tmp_path / "client.py",
        config={"step": 0.5},
        per_site_config={"site-2": {"step": 1.5}},
    )
    remote = recipe.execute(env=env)
    result = remote.get_result()
    local = recipe.execute(env=SimEnv(num_clients=2, workspace=tmp_path / "runs", progress=False)).get_result()
    assert result.path.read_bytes() == local.path.read_bytes()
    assert result.denominators == local.denominators == {"accuracy": 21}
    assert list(local.endings) == ["site-2"]

    store = Store(str(Path(remote.path).parent))
    described = JobResult.read(store, JobPaths(remote.job_id).result)
    wait_until(lambda: bool(read_endings(store, remote.job_id, described, result.records)), timeout_s=120)
    assert remote.get_result().endings == local.endings == {"site-2": "the script ended with exit code 3"}
    show = ["job", "show", remote.job_id, "--home", str(tmp_path / "poc")]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(show)
    assert "site-2: after its last round, the script ended with exit code 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*show, "--json"])
    assert json.loads(capsys.readouterr().out)["endings"] == local.endings
