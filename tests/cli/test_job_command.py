"""`fedpool job` with a job.json that somebody changed: one sentence, which names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import FedAvgRecipe, Store
from fedpool.cli import main
from fedpool.flows.staging import stage
from fedpool.tasks.job_record import EnvironmentRecord

SITES = ("site-1", "site-2")
VIRTUAL = EnvironmentRecord(type="SimEnv", settings={"speeds": {"site-1": 1.0, "site-2": 2.0}})
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The job.json of a staged job in virtual time."""
    (tmp_path / "client.py").write_text("import fedpool.client\n")
    recipe = FedAvgRecipe(
        name="job", min_clients=2, num_rounds=1, model={"w": np.zeros(3)}, train_script=str(tmp_path / "client.py")
    )
    stage(recipe, "job-1", Store(tmp_path / "store"), SITES, simulated=True, environment=VIRTUAL)
    return tmp_path / "store" / "job-1" / "job.json"


def speeds(value: object) -> Change:
    return lambda job: job["environment"]["settings"].update(speeds=value)


def weights(value: object) -> Change:
    return lambda job: job["recipe"].update(aggregation_weights=value)


@pytest.mark.parametrize("command", ["show", "verify", "replay"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (speeds([1, 2]), "environment.settings: Value error, speeds: Input should be a valid dictionary"),
        (speeds({"site-1": "fast", "site-2": 1}), "speeds.site-1: Input should be a valid number"),
        (speeds({"site-1": 1, "site-2": 0}), "speeds.site-2: Input should be greater than 0"),
        (speeds({"site-1": 1}), "environment.settings.speeds lacks site-2"),
        (weights([1, 2]), "aggregation_weights: Input should be a valid dictionary"),
        (weights({"site-1": "heavy"}), "aggregation_weights.site-1: Input should be a valid number"),
    ],
)
def test_what_is_wrong_in_a_jobs_description_is_one_sentence(
    job: Path, capsys: pytest.CaptureFixture[str], command: str, change: Change, words: str
) -> None:
    described = json.loads(job.read_text())
    change(described)
    job.chmod(0o600)
    job.write_text(json.dumps(described))
    with pytest.raises(SystemExit) as ended:
        main(["job", command, "job-1", "--store", str(job.parents[1])])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{job} does not describe a job: ") and words in line
