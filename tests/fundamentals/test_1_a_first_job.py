"""A federated job in three steps: a client script, a recipe, an environment. Read the files here
in order, as a tutorial.
"""

from pathlib import Path

import numpy as np
import pytest

from fedpool import FedAvgRecipe, SimEnv

# 1. A client script is a training script plus a few lines. This one "trains" by adding 1 to what it
# receives.
CLIENT = """
import fedpool.client as flare

flare.init()
while flare.is_running():
    input_model = flare.receive()
    params = {name: value + 1 for name, value in input_model.params.items()}
    flare.send(flare.FLModel(params=params))
"""


@pytest.mark.usefixtures("prefect_api")
def test_three_rounds_over_two_sites(tmp_path: Path) -> None:
    """Every site adds 1 per round, and so does their mean."""
    (tmp_path / "client.py").write_text(CLIENT)

    # 2. A recipe says what to run.
    recipe = FedAvgRecipe(
        name="first",
        min_clients=2,
        num_rounds=3,
        model={"w": np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)},
        train_script=tmp_path / "client.py",
    )

    # 3. An environment says where.
    run = recipe.execute(env=SimEnv(num_clients=2, workspace=tmp_path / "runs", progress=False))

    result = run.get_result()
    assert result.params["w"].tolist() == [[4, 5, 6], [7, 8, 9], [10, 11, 12]]

    # Everything that the job did is in its folder, as safetensors and JSON.
    names = sorted(path.relative_to(run.path).as_posix() for path in Path(run.path).rglob("*.json"))
    assert names[:3] == ["job.json", "result.json", "rounds/00000/round.json"]
