"""Verification: an honest record passes, and any later change to it is reported by name."""

import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedpool import FedAvgRecipe, SimEnv
from fedpool.cli import main
from fedpool.errors import IntegrityError
from fedpool.flows.verify import Verified, verify_job
from fedpool.store import Store, to_json
from tests.records import record_of

# site-3 sends a NaN in round 1 and fails in round 2; otherwise each adds its site number.
SCRIPT = """
    import fedpool.client as flare
    import numpy as np

    flare.init()
    site = int(flare.get_site_name()[-1])
    while flare.is_running():
        model = flare.receive()
        if site == 3 and model.current_round == 2 and flare.is_train():
            raise ValueError("no data")
        params = {name: value + site for name, value in model.params.items()}
        if site == 3 and model.current_round == 1:
            params["w"][1] = np.nan
        score = float(model.params["w"][0])
        flare.send(flare.FLModel(params=params, metrics={"accuracy": score}, meta={"NUM_STEPS_CURRENT_ROUND": site}))
"""


@pytest.fixture(scope="module")
def finished(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job: three rounds and the evaluation."""
    folder = tmp_path_factory.mktemp("verify")
    script = folder / "client.py"
    script.write_text(textwrap.dedent(SCRIPT))
    model = {"w": np.zeros(3, np.float32), "a.count": np.zeros((), np.int64)}
    recipe = FedAvgRecipe(name="audit", min_clients=2, num_rounds=3, model=model, train_script=script)
    run = recipe.execute(env=SimEnv(num_clients=3, workspace=folder / "runs", progress=False))
    return folder / "runs" / run.job_id


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A writable copy of the finished job."""
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copy


def verify(job: Path) -> Verified:
    return verify_job(Store(job.parent), job.name)


def command(*arguments: str) -> int | str | None:
    """The exit code of the `fedpool` command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(to_json(value))


def test_an_honest_record_passes_and_the_command_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(finished) == Verified(num_rounds=4, num_updates=11, num_pruned=0, status="COMPLETED")
    assert command("job", "verify", finished.name, "--store", str(finished.parent)) == 0
    assert "4 rounds and 11 updates verified: every hash matches" in capsys.readouterr().out
    assert command("job", "verify", finished.name, "--store", str(finished.parent), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "num_rounds": 4,
        "num_updates": 11,
        "num_pruned": 0,
        "status": "COMPLETED",
    }


def test_a_job_without_a_result_is_verified_as_far_as_it_went(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "result.json").unlink()
    (job / "rounds/00003/round.json").unlink()
    assert verify(job) == Verified(num_rounds=3, num_updates=8, num_pruned=0, status=None)
    assert command("job", "verify", job.name, "--store", str(job.parent)) == 0
    assert "it has no result yet" in capsys.readouterr().out


def test_a_rejection_in_other_words_is_the_same_rejection(job: Path) -> None:
    """Messages are reworded between versions; the code stays the same, so only it is compared."""
    (job / "result.json").unlink()
    (job / "rounds/00003/round.json").unlink()
    (job / "rounds/00002/round.json").unlink()
    record = job / "rounds/00001/round.json"
    edit(record, lambda round: round["rejected"][0].update(reason="as an earlier version said it"))
    assert verify(job) == Verified(num_rounds=2, num_updates=6, num_pruned=0, status=None)
    edit(record, lambda round: round["rejected"][0].update(code="shape"))
    with pytest.raises(IntegrityError, match="rejected"):
        verify(job)


def forge(job: Path) -> None:
    """Replace site-1's update and fix every hash; the model made from it no longer follows."""
    folder = job / "rounds/00000/sites/site-1"
    tensors = load_file(folder / "update.safetensors")
    tensors["w"] = tensors["w"] + 1
    save_file(tensors, folder / "update.safetensors")
    data = (folder / "update.safetensors").read_bytes()
    claims = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit(folder / "update.json", lambda manifest: manifest.update(claims))
    edit(job / "rounds/00000/round.json", lambda record: record["accepted"][0].update(claims))


def as_accepted(rejected: dict[str, Any]) -> dict[str, Any]:
    """A record entry that claims that a rejected update was accepted."""
    claims = {name: rejected[name] for name in ("site", "attempt", "sha256", "manifest_sha256")}
    return {**record_of({"accepted": [claims]}).as_json()["accepted"][0], **claims}


R = "rounds/0000{}/round.json"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the initial model": (
        lambda job: flip(job / "rounds/00000/global.safetensors"),
        r"00000/global\.safetensors",
    ),
    "a bit of a later model": (lambda job: flip(job / "rounds/00002/global.safetensors"), r"00002/global\.safetensors"),
    "a bit of the last model": (
        lambda job: flip(job / "rounds/00003/global.safetensors"),
        r"00003/global\.safetensors",
    ),
    "no model": (
        lambda job: (job / "rounds/00001/global.safetensors").unlink(),
        r"00001/global\.safetensors is missing",
    ),
    "a bit of an update": (
        lambda job: flip(job / "rounds/00001/sites/site-2/update.safetensors"),
        r"00001/sites/site-2/update\.safetensors was accepted, but should have been rejected \(bytes\)",
    ),
    "no update": (
        lambda job: (job / "rounds/00000/sites/site-3/update.safetensors").unlink(),
        r"00000/sites/site-3/update\.safetensors was accepted, but should have been rejected \(bytes\)",
    ),
    "no manifest": (
        lambda job: (job / "rounds/00000/sites/site-3/update.json").unlink(),
        r"00000/sites/site-3/update\.json is missing",
    ),
    "a manifest that is none": (
        lambda job: (job / "rounds/00000/sites/site-3/update.json").write_text("{}"),
        r"00000/sites/site-3/update\.json was accepted, but should have been rejected \(manifest\): its manifest is invalid",
    ),
    "a weight in a manifest": (
        lambda job: edit(job / "rounds/00000/sites/site-2/update.json", lambda manifest: manifest.update(weight=200.0)),
        r"00001/global\.safetensors does not follow from round 0's updates: (w|a\.count) differs",
    ),
    "a score in a record": (
        lambda job: edit(job / R.format(1), lambda record: record["metrics"].update(accuracy=0.99)),
        r"00001/round\.json says metrics \{'accuracy': 0\.99\}, but it should be \{'accuracy': ",
    ),
    "a time in a record, which nothing else tells": (
        lambda job: edit(job / R.format(0), lambda record: record["timings"].update(round_s=1.0)),
        r"00001/round\.json says previous_sha256",
    ),
    "a time in the last record": (
        lambda job: edit(job / R.format(3), lambda record: record["timings"].update(round_s=1.0)),
        r"result\.json says last_record_sha256",
    ),
    "a rejection that is hidden": (
        lambda job: edit(job / R.format(1), lambda record: record.update(rejected=[])),
        r"00001/round\.json says sites",
    ),
    "a rejected update that was let in": (
        lambda job: edit(
            job / R.format(1),
            lambda record: record.update(
                accepted=[*record["accepted"], *(as_accepted(entry) for entry in record["rejected"])], rejected=[]
            ),
        ),
        r"00001/sites/site-3/update\.safetensors was accepted, but should have been rejected \(not_finite\)",
    ),
    "an update with all its hashes": (
        forge,
        r"00001/global\.safetensors does not follow from round 0's updates: w differs",
    ),
    "the bundle": (
        lambda job: flip(next(job.glob("bundle-*.zip"))),
        r"bundle-\w+\.zip does not match the hash in its name",
    ),
    "the recipe": (
        lambda job: edit(job / "job.json", lambda record: record["recipe"].update(aggregation_weights={"site-1": 5.0})),
        r"00001/global\.safetensors does not follow from round 0's updates",
    ),
    "a recipe of another kind": (
        lambda job: edit(job / "job.json", lambda record: record["recipe"].update(type="FedSecretRecipe")),
        r"job\.json has a recipe of the unknown class 'FedSecretRecipe': known classes are .*FedAvgRecipe",
    ),
    "a record that is none": (
        lambda job: edit(job / R.format(2), lambda record: record.pop("accepted")),
        r"00002/round\.json does not describe a round: accepted: Field required",
    ),
    "a record that is no JSON": (
        lambda job: (job / R.format(2)).write_text("{"),
        r"00002/round\.json is not JSON",
    ),
    "the form of a record": (
        lambda job: (job / R.format(2)).write_bytes((job / R.format(2)).read_bytes() + b"\n"),
        r"00002/round\.json is not in the form in which records are written",
    ),
    "a round that is hidden": (
        lambda job: (job / R.format(3)).unlink(),
        r"result\.json says num_records 4, but it should be 3",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_changed_is_named(job: Path, case: str) -> None:
    change, message = CASES[case]
    change(job)
    with pytest.raises(IntegrityError, match=message):
        verify(job)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_flipped_bit_in_any_one_file_is_found(finished: Path, data: st.DataObject) -> None:
    outside = finished / "logs"  # scripts' output is for people, not part of the record
    files = sorted(path for path in finished.rglob("*") if path.is_file() and outside not in path.parents)
    assert len(files) >= 30
    path = data.draw(st.sampled_from(files))
    honest = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(honest) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(honest)
    changed[at] ^= 1 << bit
    try:
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            verify(finished)
    finally:
        path.write_bytes(honest)


def test_the_command_ends_with_1_and_one_line(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(job / "rounds/00002/global.safetensors")
    assert command("job", "verify", job.name, "--store", str(job.parent)) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert command("job", "verify", "other-job", "--store", str(job.parent)) == 1
    assert "there is no job 'other-job'" in capsys.readouterr().err
