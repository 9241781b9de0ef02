"""Three rounds over two sites: [[1, 2, 3], [4, 5, 6], [7, 8, 9]] becomes [[4, 5, 6], [7, 8, 9],
[10, 11, 12]].
"""

from pathlib import Path

import numpy as np

from fedpool import FedAvgRecipe, SimEnv

recipe = FedAvgRecipe(
    name="hello-numpy",
    min_clients=2,
    num_rounds=3,
    model={"numpy_key": np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.float32)},
    train_script=Path(__file__).parent / "client.py",
)
run = recipe.execute(env=SimEnv(num_clients=2))
print(run.get_result().params["numpy_key"].tolist())
