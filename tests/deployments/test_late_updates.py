"""Jobs whose late updates count in a later round: in simulation, after the coordinator is lost,
and in a proof of concept.
"""

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import FedAvgRecipe, PocEnv, Run, SimEnv
from fedpool.errors import IntegrityError
from fedpool.flows.replay import replay_round
from fedpool.flows.stored import recipe_of
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.deployments.test_quorum import WAIT, names
from tests.poc import brought_up

pytestmark = pytest.mark.usefixtures("leaves_nothing")

# site-2 is late in round 0, but its update arrives before round 1 closes; then it hangs.
SLOW = """
        if site == 'site-2' and round == 0:
            wait_for(job / '00000/round.json')
            model.params = {name: value + 7 for name, value in model.params.items()}
        if site == 'site-1' and round == 1:
            wait_for(job / '00000/sites/site-2/update.json')
        if site == 'site-2' and round > 0:
            wait_for(here / 'never')
"""


def fold(run_job: Callable[..., Run], tmp_path: Path, **fields: Any) -> Run:
    given = {"num_rounds": 2, "min_clients": 1, "quorum_grace": 0.0, "late": "fold", **fields}
    return run_job(WAIT.format(fault=SLOW.strip()), train_args=[str(tmp_path)], **given)


def test_a_late_update_counts_in_the_next_round(run_job: Callable[..., Run], tmp_path: Path) -> None:
    result = fold(run_job, tmp_path, num_rounds=2).get_result()
    first, second = result.rounds[:2]
    assert (names(first["accepted"]), names(first["late"])) == (["site-1"], ["site-2"])
    assert "late_accepted" not in first
    (entry,) = second["late_accepted"]
    assert (entry["site"], entry["round"], entry["staleness"], entry["attempt"]) == ("site-2", 0, 1, 0)
    share = 1 / np.sqrt(2)  # site-1 adds 1 to the model, site-2 added 8 to its own base
    np.testing.assert_allclose(result.params["w"], np.full(3, 1 + (1 + share * 8) / (1 + share)), rtol=1e-6)
    store = Store(tmp_path / "runs")
    verify_job(store, result.job_id)
    replayed = replay_round(store, result.job_id, tmp_path / "again.safetensors", round=1)
    assert (replayed.sites, replayed.distance) == (["site-1", "site-2"], 0.0)
    without = replay_round(store, result.job_id, tmp_path / "less.safetensors", round=1, leave_out=["site-2"])
    assert without.distance > 1
    counts_it_twice(store, result.job_id)


def counts_it_twice(store: Store, job_id: str) -> None:
    """Verification detects a record that lists a late update that was not owed."""
    path = JobPaths(job_id).record(1)
    record = store.read_json(path)
    store.remove(path)
    store.write_json(path, {**record, "late_accepted": record["late_accepted"] * 2})
    with pytest.raises(IntegrityError, match=r"late update of site-2 from round 0, attempt 0, which was not owed"):
        verify_job(store, job_id)


def test_with_a_quorum_of_all_the_model_is_that_of_federated_averaging(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    script = WAIT.format(fault="model.params = {k: v * 1.1 + round + len(site) for k, v in model.params.items()}")
    found = {}
    for late in ("drop", "fold"):
        run = run_job(script, train_args=[str(tmp_path)], num_rounds=2, min_clients=2, quorum_grace=0.0, late=late)
        found[late] = run.get_result().rounds[1]["next_global"]["sha256"]
    assert found["drop"] == found["fold"]


@pytest.mark.parametrize("round", [0, 1])
def test_a_late_update_is_folded_once_when_the_coordinator_was_lost_after_the_commit(
    run_job: Callable[..., Run], tmp_path: Path, round: int
) -> None:
    """From its state in the store after round 0's commit, and after round 1's, the job continues to
    the same model.
    """
    run = fold(run_job, tmp_path, num_rounds=2, keep_updates="last", final_evaluation=False)
    before, store, paths = run.get_result(), Store(tmp_path / "runs"), JobPaths(run.job_id)
    rounds = before.rounds
    store.remove(paths.result)
    if round == 0:
        store.remove(paths.record(1))
        store.remove(paths.global_model(2))
    recipe = recipe_of(run.job_id, store)
    env = SimEnv(num_clients=2, workspace=tmp_path / "runs", progress=False)
    result = recipe.execute(env, resume=run.job_id).get_result()
    same = {"timings": None, "accepted": None}
    assert {**result.rounds[1], **same} == {**rounds[1], **same}
    verify_job(store, run.job_id)


BY_ROUND = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        step = (model.current_round + 1) * (int(flare.get_site_name()[-1]) + 0.1)
        flare.send(flare.FLModel(params={name: value * 0.9 + step for name, value in model.params.items()}))
"""
SPEEDS = {"num_clients": 4, "num_threads": 2, "speeds": [1, 2, 5, 12]}
VIRTUAL = {"num_rounds": 6, "min_clients": 2, "quorum_grace": 0.0, "late": "fold"}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that doesn't depend on when the sites' work was done, and by whom."""
    of_site = {"seconds", "manifest_sha256", "attempt"}
    said = {key: value for key, value in record.items() if key not in ("timings", "previous_sha256", "job_id")}
    for kind in ("accepted", "late", "late_accepted"):
        said[kind] = [{key: entry[key] for key in entry.keys() - of_site} for entry in record.get(kind, ())]
    return said


def test_in_virtual_time_who_is_late_follows_from_the_speeds_and_not_from_the_machine(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    found = [run_job(BY_ROUND, env=SPEEDS | {"num_threads": n}, **VIRTUAL).get_result() for n in (1, 4)]
    one, other = ([without_times(record) for record in result.rounds] for result in found)
    assert one == other
    assert [record["virtual_time"] for record in one] == [2, 4, 6, 8, 10, 12]
    came = [[(entry["site"], entry["round"]) for entry in record["late_accepted"]] for record in one]
    assert came == [[], [], [("site-3", 0)], [], [("site-3", 2)], [("site-4", 0)]]
    verify_job(Store(tmp_path / "runs"), found[0].job_id)


def test_in_virtual_time_a_lost_coordinator_comes_to_the_same_rounds(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    """The coordinator is lost after round 2, while site-3 and site-4 are working on earlier rounds;
    one of them has written its update.
    """
    run = run_job(BY_ROUND, env=SPEEDS, **VIRTUAL)
    before, store, paths = run.get_result().rounds, Store(tmp_path / "runs"), JobPaths(run.job_id)
    for number in range(4, 7):
        shutil.rmtree(store.full(paths.round(number)))
    for lost in (paths.result, paths.record(3), paths.manifest(0, "site-4")):
        store.remove(lost)
    recipe = recipe_of(run.job_id, store)
    env = SimEnv(num_clients=4, workspace=tmp_path / "runs", progress=False)
    after = recipe.execute(env, resume=run.job_id).get_result().rounds
    assert [without_times(record) for record in after] == [without_times(record) for record in before]
    (entry,) = after[5]["late_accepted"]
    assert (entry["site"], entry["attempt"]) == ("site-4", 1)  # its unfinished work was redone
    verify_job(store, run.job_id)


def test_an_update_of_a_site_elsewhere_counts_when_it_comes(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(ELSEWHERE))
    recipe = FedAvgRecipe(
        name="late",
        model={"w": np.zeros(3, np.float32)},
        train_script=script,
        num_rounds=3,
        min_clients=1,
        quorum_grace=0.0,
        late="fold",
        final_evaluation=False,
        config={"folder": str(tmp_path)},
    )
    with brought_up(PocEnv(num_clients=2, home=tmp_path / "poc", progress=False)) as env:
        run = recipe.execute(env)
        result = run.get_result()
        first, second = result.rounds[:2]
        assert (names(first["accepted"]), names(first["late"])) == (["site-1"], ["site-2"])
        (entry,) = second["late_accepted"]
        assert (entry["site"], entry["round"], entry["staleness"]) == ("site-2", 0, 1)
        share = 1 / np.sqrt(2)
        np.testing.assert_allclose(result.params["w"], np.full(3, 2 + (1 + share * 8) / (1 + share)), rtol=1e-6)
        assert verify_job(run._store, run.job_id).num_updates == 4


# site-2 sends its first update once round 0 has closed, and then trains forever; in round 1, site-1
# waits for that update.
ELSEWHERE = """
    import pathlib, threading
    import fedpool.client as flare

    flare.init()
    folder = pathlib.Path(flare.get_config()["folder"])

    def wait_for(path):
        while not list(folder.glob(path)):
            threading.Event().wait(0.05)

    while flare.is_running():
        model = flare.receive()
        site, number, step = flare.get_site_name(), model.current_round, 1
        if site == "site-2":
            wait_for("**/rounds/00000/round.json" if number == 0 else "never")
            step = 8
        elif number == 1:
            wait_for("**/rounds/00000/sites/site-2/update.json")
        flare.send(flare.FLModel(params={name: value + step for name, value in model.params.items()}))
"""
