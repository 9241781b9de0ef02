"""Someone who can write to the store changes what a round computes with, while it computes.

The round fails with the name of the object, and commits nothing. Once the object is restored, the
job is resumed, and ends with the bytes of an undisturbed one.
"""

import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import FedAvgRecipe, FedOptRecipe, JobFailed, JobStatus, Recipe, Run, TrainingRecipe
from fedpool.arrays import load_arrays, save_and_hash, torch_block
from fedpool.client.hosts import Assignment
from fedpool.errors import ModelChanged
from fedpool.filters import ElementwiseFilter
from fedpool.flows.replay import replay_round
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.sites.session import Reply
from fedpool.store import Store
from fedpool.tasks.committed import Committed
from fedpool.tasks.gate import Accepted
from fedpool.tasks.publish import publish_submitted
from tests.own_environment import FunctionSession, SessionEnv, reply
from tests.updates import sent_by

MODEL: dict[str, Any] = {
    "w": np.zeros((2, 3), np.float32),
    "head": np.full(4, 5, np.float32),
    "count": np.zeros((), np.int64),
}


class FromModel(ElementwiseFilter):
    """Sends the difference to the global model."""

    def outgoing_values(self, values: Any, block: Any, context: Any) -> Any:
        return values - self._model(block, context)

    def incoming_values(self, values: Any, block: Any, context: Any) -> Any:
        return values + self._model(block, context)

    def _model(self, block: Any, context: Any) -> Any:
        return torch_block(context.base.read_block(block.name, block.start, block.stop), "F32")


class Site(FunctionSession):
    """Adds 1, and declares its update as `says`.

    Args:
        meanwhile: called once it has trained and `others` have received their models.
    """

    def __init__(
        self, says: str, fetched: threading.Event, meanwhile: Callable[[Assignment], None] | None = None
    ) -> None:
        super().__init__(lambda params: params, 1.0)
        self._says = says
        self._fetched = fetched
        self._meanwhile = meanwhile

    def perform(self, assignment: Assignment, *, deadline: float | None, log: LogLine) -> Reply:
        assert assignment.model is not None
        params = load_arrays(assignment.model, "numpy")
        sent = {
            name: np.asarray((value * 0 if self._says == "DIFF" else value) + 1, value.dtype)
            for name, value in params.items()
            if name not in assignment.exclude
        }
        said = reply(assignment, sent, 1.0)
        if self._meanwhile is None:
            self._fetched.set()
        elif self._fetched.wait(60):
            self._fetched.clear()
            self._meanwhile(assignment)
        return Reply({**said.update, "params_type": self._says}, said.logged)


@dataclass
class Writer:
    """Changes an object of the store in place, once, during the last of three rounds."""

    runs: Path
    what: Callable[[JobPaths, int], str]
    before: bytes = b""
    path: Path = Path()

    def __call__(self, assignment: Assignment) -> None:
        if assignment.round != 2 or self.before:
            return
        (job,) = (folder.name for folder in self.runs.iterdir() if not folder.name.startswith("."))
        self.path = self.runs / self.what(JobPaths(job), assignment.round)
        self.before = self.path.read_bytes()
        thousands = {
            name: np.asarray(value * 0 + 1000, value.dtype) for name, value in load_arrays(self.path, "numpy").items()
        }
        with self.path.open("r+b") as file:
            save_and_hash(file, thousands)

    def restore(self) -> None:
        self.path.write_bytes(self.before)


def model_of(paths: JobPaths, number: int) -> str:
    return paths.global_model(number)


def state_of(paths: JobPaths, number: int) -> str:
    return paths.state(number - 1)


CASES: dict[str, tuple[type[TrainingRecipe], str, dict[str, Any], Callable[[JobPaths, int], str]]] = {
    "a difference is added to it": (FedAvgRecipe, "DIFF", {"params_transfer_type": "DIFF"}, model_of),
    "the host subtracts it": (FedAvgRecipe, "FULL", {"params_transfer_type": "DIFF"}, model_of),
    "updates may not be far from it": (FedAvgRecipe, "FULL", {"max_update_norm": 10}, model_of),
    "updates are clipped": (FedAvgRecipe, "FULL", {"max_update_norm": 10, "clip_updates": True}, model_of),
    "a filter reads it": (FedAvgRecipe, "FULL", {"filters": [FromModel()]}, model_of),
    "a part of it stays": (FedAvgRecipe, "FULL", {"exclude_vars": "head"}, model_of),
    "updates are compared": (FedAvgRecipe, "FULL", {"aggregator": "geometric_median"}, model_of),
    "nothing computes with it": (FedAvgRecipe, "FULL", {}, model_of),
    "a server's optimizer starts from it": (FedOptRecipe, "FULL", {}, model_of),
    "it is the optimizer's momentum": (FedOptRecipe, "FULL", {}, state_of),
}


def recipe_of(case: str, folder: Path) -> Recipe:
    kind, _, fields, _ = CASES[case]
    (folder / "client.py").write_text("import fedpool.client\n")
    train_script = folder / "client.py"
    return kind(name="changed", min_clients=2, num_rounds=3, model=MODEL, train_script=train_script, **fields)


def env_of(case: str, folder: Path, meanwhile: Callable[[Assignment], None]) -> SessionEnv:
    says, fetched = CASES[case][1], threading.Event()
    return SessionEnv({"site-1": Site(says, fetched), "site-2": Site(says, fetched, meanwhile)}, folder / "runs")


def tensors_of(run: Run) -> Mapping[str, bytes]:
    folder = Path(run.path)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("rounds/*/*.safetensors")}


@pytest.mark.parametrize("case", CASES)
def test_the_round_fails_by_its_name_and_goes_on_once_it_is_restored(
    case: str, prefect_api: str, tmp_path: Path
) -> None:
    (tmp_path / "calm").mkdir()
    calm = recipe_of(case, tmp_path).execute(env_of(case, tmp_path / "calm", lambda assignment: None))
    assert calm.get_status() is JobStatus.COMPLETED
    writer = Writer(tmp_path / "runs", CASES[case][3])
    run = recipe_of(case, tmp_path).execute(env_of(case, tmp_path, writer))
    assert run.get_status() is JobStatus.FAILED
    with pytest.raises(JobFailed) as failed:
        run.get_result()
    # Where a site's host computes with it, the host may notice first.
    assert re.search(f"{writer.path} (was changed after it was checked|differs from its manifest)", str(failed.value))
    assert "rejected" not in str(failed.value)  # no update is to blame
    assert [path.parent.name for path in sorted(Path(run.path).glob("rounds/*/round.json"))] == ["00000", "00001"]
    writer.restore()
    again = recipe_of(case, tmp_path).execute(env_of(case, tmp_path, lambda assignment: None), resume=run.job_id)
    assert again.get_status() is JobStatus.COMPLETED
    assert tensors_of(again) == tensors_of(calm)
    verify_job(Store(tmp_path / "runs"), run.job_id)


def test_a_job_in_a_store_with_larger_blocks_is_verified_and_replayed(prefect_api: str, tmp_path: Path) -> None:
    """Updates and models are read again in the blocks in which they were checked."""
    (tmp_path / "client.py").write_text("import fedpool.client\n")
    recipe = FedAvgRecipe(
        name="large", min_clients=2, num_rounds=1, model={"w": np.zeros(200_000)}, train_script=tmp_path / "client.py"
    )
    run = recipe.execute(env_of("nothing computes with it", tmp_path, lambda assignment: None))
    assert run.get_status() is JobStatus.COMPLETED
    store = Store(f"memory://fedpool-{uuid.uuid4().hex}")
    store.fs.put(run.path, store.full(run.job_id), recursive=True)
    assert store.block_elements > 200_000 > Store(tmp_path / "runs").block_elements
    assert verify_job(store, run.job_id).status == "COMPLETED"
    assert replay_round(store, run.job_id, tmp_path / "replayed.safetensors").distance == 0
    store.fs.rm(store.root, recursive=True)


LATE = """
    import pathlib, sys
    import numpy as np
    import fedpool.client as flare
    from fedpool.arrays import save_and_hash

    flare.init()
    while flare.is_running():
        model = flare.receive()
        if flare.get_site_name() == "site-1" and model.current_round == 1 and sys.argv[1:]:
            (path,) = pathlib.Path(sys.argv[1]).glob("*/rounds/00000/global.safetensors")
            with path.open("r+b") as file:
                save_and_hash(file, {"w": np.full(3, 1000.0)})
        flare.send(flare.FLModel(params={name: value + 1 for name, value in model.params.items()}))
"""


@pytest.mark.parametrize("limit", [None, 10.0])
def test_the_model_of_an_earlier_round_is_checked_when_a_late_update_counts(
    limit: float | None, run_job: Callable[..., Run], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "min_clients": 1,
        "quorum_grace": 0,
        "late": "fold",
        "num_rounds": 3,
        "model": {"w": np.zeros(3)},
        "max_update_norm": limit,
        "env": {"num_clients": 2, "speeds": [2, 3]},
    }
    result = run_job(LATE, **fields).get_result()
    assert [entry["round"] for entry in result.rounds[1]["late_accepted"]] == [0]
    env = {**fields.pop("env"), "workspace": tmp_path / "again"}
    run = run_job(LATE, **fields, env=env, train_args=[str(tmp_path / "again")])
    with pytest.raises(JobFailed, match=r"rounds/00000/global\.safetensors was changed after it was checked"):
        run.get_result()


def test_a_submitted_model_is_not_completed_with_parameters_that_were_changed(tmp_path: Path) -> None:
    store, paths = Store(tmp_path), JobPaths("job-1")
    with store.staged(paths.global_model(0)) as file:
        digest = save_and_hash(file, MODEL)
    with store.staged(paths.update(0, "site-1")) as file:
        sent = save_and_hash(file, {"w": MODEL["w"] + 1})
    base = Committed(store).tensors(paths.global_model(0), digest)
    update = store.tensors(paths.update(0, "site-1"), sent.size)
    manifest = sent_by("site-1", task="submit_model", sha256=sent.sha256, size=sent.size)
    with (tmp_path / paths.global_model(0)).open("r+b") as file:
        save_and_hash(file, {name: value + 1 for name, value in MODEL.items()})
    with pytest.raises(ModelChanged, match=r"global\.safetensors differs from its manifest"):
        publish_submitted(store, paths, base, [Accepted(manifest, "m" * 64, 1.0, update)], 1)
