"""Replaying a round, and how long its updates are kept."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpool import FedNovaRecipe, Run
from fedpool.cli import main
from fedpool.errors import ConfigError, RecipeError, RoundError
from fedpool.flows.replay import replay_round
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.own_algorithm import importable

# site-1 adds 1 each round, site-2 adds 2, site-3 adds 30.
SCRIPT = """
    import fedpool.client as flare

    flare.init()
    step = {"site-1": 1, "site-2": 2, "site-3": 30}[flare.get_site_name()]
    while flare.is_running():
        model = flare.receive()
        params = {name: value + step for name, value in model.params.items()}
        flare.send(flare.FLModel(params=params, metrics={"accuracy": 0.5}))
"""


@pytest.fixture
def job(run_job: Callable[..., Run]) -> Callable[..., Run]:
    return lambda **fields: run_job(
        SCRIPT, env={"num_clients": 3}, **{"min_clients": 3, "model": {"w": np.zeros(4, np.float32)}} | fields
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def command(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_a_replay_of_the_same_is_the_same(job: Callable[..., Run], store: Store, tmp_path: Path) -> None:
    run = job()
    for number in (0, 1):
        found = replay_round(store, run.job_id, tmp_path / f"{number}.safetensors", round=number)
        assert found.sites == ["site-1", "site-2", "site-3"]
        assert (found.distance, found.moved) == (0.0, 22.0)  # four parameters move by 11
        assert found.sha256 == store.read_json(JobPaths(run.job_id).record(number))["next_global"]["sha256"]


def test_a_replay_by_another_strategy(job: Callable[..., Run], store: Store, tmp_path: Path) -> None:
    found = replay_round(store, job().job_id, tmp_path / "median.safetensors", strategy="median")
    assert found.round == 1  # the last
    np.testing.assert_array_equal(load_file(tmp_path / "median.safetensors")["w"], np.full(4, 11 + 2))
    assert found.distance == 18.0  # 9 in each of four


def test_a_replay_without_a_site_tells_what_it_contributed(
    job: Callable[..., Run], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job()
    out = tmp_path / "without.safetensors"
    where = ("--store", store.url, "--leave-out", "site-3", "--round", "0")
    assert command("job", "replay", run.job_id, *where, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert f"round 0 of {run.job_id}, from site-1, site-2: sha256 " in printed
    assert "the round moved the model by 22 (L2); this model is 19 from the committed one" in printed
    np.testing.assert_array_equal(load_file(out)["w"], np.full(4, 1.5))
    assert command("job", "replay", run.job_id, *where, "--json") == 0
    assert json.loads(capsys.readouterr().out)["distance"] == 19.0


def test_an_aggregator_that_fails_without_a_site_is_one_sentence(
    job: Callable[..., Run], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "thirds.py"
    file.write_text("def third(values, weights):\n    return values[2]\n")
    with importable(file.parent):
        run = job(aggregator="thirds:third", num_rounds=1)
        assert command("job", "replay", run.job_id, "--store", store.url, "--leave-out", "site-2") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aggregator thirds:third failed at parameter w: IndexError: ")
    assert line.endswith(f"({file}, line 2)")


def test_what_cannot_be_replayed_is_said(job: Callable[..., Run], store: Store, tmp_path: Path) -> None:
    run = job()
    target = tmp_path / "out.safetensors"
    with pytest.raises(RecipeError, match=r'aggregator "mode" is unknown.*Use mean, median'):
        replay_round(store, run.job_id, target, strategy="mode")
    with pytest.raises(RecipeError, match="site-9 sent nothing that round 1 used: name some of site-1, site-2, site-3"):
        replay_round(store, run.job_id, target, leave_out=["site-9"])
    with pytest.raises(RecipeError, match="no updates are left"):
        replay_round(store, run.job_id, target, leave_out=["site-1", "site-2", "site-3"])
    with pytest.raises(RoundError, match=r"round 7 of job .* is not committed"):
        replay_round(store, run.job_id, target, round=7)
    with pytest.raises(RoundError, match=r"round 2 of job .* was not a training round"):
        replay_round(store, run.job_id, target, round=2)
    assert not target.exists()


def updates_in(store: Store, job_id: str) -> list[int]:
    """The rounds whose updates are still in the store."""
    return sorted({int(path.split("/")[1]) for path in store.tree(job_id) if path.endswith("/update.safetensors")})


@pytest.mark.parametrize(("keep", "kept"), [("all", [0, 1, 2]), ("last", [2]), ("none", [])])
def test_updates_are_kept_as_long_as_the_recipe_says(
    keep: str, kept: list[int], job: Callable[..., Run], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job(num_rounds=3, keep_updates=keep)
    assert updates_in(store, run.job_id) == kept
    assert len([path for path in store.tree(run.job_id) if path.endswith("/update.json")]) == 12
    found = verify_job(store, run.job_id)
    assert (found.num_updates, found.num_pruned) == (12, 3 * (3 - len(kept)))
    assert command("job", "verify", run.job_id, "--store", store.url) == 0
    assert (f"{found.num_pruned} updates were not kept" in capsys.readouterr().out) == (keep != "all")


def test_a_site_that_took_no_step_is_verified_when_its_updates_are_gone_and_is_no_model_alone(
    run_job: Callable[..., Run], store: Store, tmp_path: Path
) -> None:
    script = SCRIPT.replace('metrics={"accuracy": 0.5}', 'meta={"LOCAL_STEPS": 0 if step == 2 else step}')
    fields = {"min_clients": 3, "model": {"w": np.zeros(4, np.float32)}, "num_rounds": 3}
    run = run_job(script, kind=FedNovaRecipe, env={"num_clients": 3}, keep_updates="last", **fields)
    assert [entry["weight"] for entry in run.get_result().rounds[0]["accepted"]] == [1, 0, 1]
    assert verify_job(store, run.job_id).num_pruned == 6
    with pytest.raises(RecipeError, match="none of the remaining updates has a weight above 0: leave out fewer sites"):
        replay_round(store, run.job_id, tmp_path / "out", leave_out=["site-1", "site-3"])


def test_a_job_is_pruned_when_it_has_ended(
    job: Callable[..., Run], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job(num_rounds=3)
    assert command("job", "prune", run.job_id, "--store", store.url) == 0
    assert "MB freed" in capsys.readouterr().out
    assert updates_in(store, run.job_id) == [2]
    assert verify_job(store, run.job_id).num_pruned == 6
    assert replay_round(store, run.job_id, tmp_path / "a.safetensors").distance == 0.0
    assert command("job", "prune", run.job_id, "--store", store.url, "--keep", "none") == 0
    assert updates_in(store, run.job_id) == []
    with pytest.raises(RoundError, match=r"the updates of round 2 were not kept \(keep_updates\)"):
        replay_round(store, run.job_id, tmp_path / "b.safetensors")


def test_a_job_that_may_go_on_is_not_pruned(job: Callable[..., Run], store: Store) -> None:
    from fedpool.deployments.stored_jobs import prune

    run = job()
    store.remove(JobPaths(run.job_id).result)
    with pytest.raises(ConfigError, match="has not ended"):
        prune(store, run.job_id, "none")
