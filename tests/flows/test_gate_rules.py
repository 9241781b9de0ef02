"""The gate's other rules in a whole job: norms and quarantine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpool import JobFailed, Run
from fedpool.flows.verify import verify_job
from fedpool.store import Store
from fedpool.tasks.quarantine import quarantined
from fedpool.tasks.record import RoundRecord
from tests.records import record_of

# In the rounds listed in its argument, site-2 sends a difference of L2 norm 50; all others have 5.
SCRIPT = """
    import json
    import sys
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        bad = flare.get_site_name() == "site-2" and model.current_round in json.loads(sys.argv[1])
        step = np.array([30, 40] if bad else [3, 4], np.float32)
        flare.send(flare.FLModel(params={"w": model.params["w"] + step, "n": model.params["n"] + 1000}))
"""
MODEL = {"w": np.zeros(2, np.float32), "n": np.zeros((), np.int64)}


def states(run: Run) -> list[dict[str, list[str]]]:
    kinds = ("accepted", "rejected", "probed")
    return [{kind: [entry["site"] for entry in record[kind]] for kind in kinds} for record in run.get_result().rounds]


def test_an_update_of_too_large_a_norm_is_rejected(run_job: Callable[..., Run], tmp_path: Path) -> None:
    run = run_job(SCRIPT, train_args=["[0]"], model=MODEL, min_clients=1, num_rounds=2, max_update_norm=5.0)
    first, second = run.get_result().rounds
    (rejected,) = first["rejected"]
    assert rejected["code"] == "norm"
    assert rejected["reason"] == "its difference to the global model has the L2 norm 50, max_update_norm is 5"
    assert [(entry["norm"], entry["scale"]) for entry in second["accepted"]] == [
        (5.0, 1.0)
    ] * 2  # integers do not count
    verify_job(Store(tmp_path / "runs"), run.job_id)


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
def test_an_update_of_too_large_a_norm_is_clipped_when_asked(
    transfer: str, run_job: Callable[..., Run], tmp_path: Path
) -> None:
    run = run_job(
        SCRIPT,
        train_args=["[0]"],
        model=MODEL,
        num_rounds=1,
        max_update_norm=10.0,
        clip_updates=True,
        params_transfer_type=transfer,
    )
    result = run.get_result()
    assert [(entry["norm"], entry["scale"]) for entry in result.rounds[0]["accepted"]] == [(5.0, 1.0), (50.0, 0.2)]
    np.testing.assert_allclose(result.params["w"], [(3 + 6) / 2, (4 + 8) / 2], rtol=1e-6)
    assert result.params["n"].item() == 1000
    verify_job(Store(tmp_path / "runs"), run.job_id)


def test_clipping_needs_a_norm(run_job: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match="clip_updates without max_update_norm: set the norm"):
        run_job(SCRIPT, clip_updates=True)


def test_a_site_in_quarantine_is_asked_as_a_probe_until_it_sends_what_passes(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    run = run_job(
        SCRIPT,
        train_args=["[0, 1, 2]"],
        model=MODEL,
        min_clients=1,
        num_rounds=5,
        max_update_norm=20.0,
        max_rejections=2,
    )
    both, one = ["site-1", "site-2"], ["site-1"]
    assert states(run) == [
        {"accepted": one, "rejected": ["site-2"], "probed": []},
        {"accepted": one, "rejected": ["site-2"], "probed": []},
        {"accepted": one, "rejected": ["site-2"], "probed": []},  # a probe that fails
        {"accepted": one, "rejected": [], "probed": ["site-2"]},  # a probe that passes, but is not used
        {"accepted": both, "rejected": [], "probed": []},
    ]
    np.testing.assert_array_equal(run.get_result().params["w"], [15, 20])
    assert verify_job(Store(tmp_path / "runs"), run.job_id).num_updates == 10


def test_a_site_in_quarantine_is_left_out_of_the_draw(run_job: Callable[..., Run]) -> None:
    run = run_job(
        SCRIPT,
        env={"num_clients": 3},
        train_args=["[0, 1, 2, 3, 4, 5]"],
        model=MODEL,
        min_clients=1,
        clients_per_round=2,
        num_rounds=6,
        max_update_norm=20.0,
        max_rejections=1,
        seed=3,
    )
    found = states(run)
    caught = next(number for number, state in enumerate(found) if state["rejected"])
    assert caught < 5, "the seed draws site-2 too late for this test"
    for state in found[caught + 1 :]:
        assert state["accepted"] == ["site-1", "site-3"]  # two are drawn from the rest
        assert state["rejected"] == ["site-2"]  # but it is asked anyway


def test_a_quorum_of_sites_in_quarantine_is_none(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT, train_args=["[0]"], model=MODEL, min_clients=2, max_update_norm=20.0, max_rejections=1)
    with pytest.raises(JobFailed, match=r"round 0: 1 of 2 sites"):
        run.get_result()


def round_of(**kinds: list[str]) -> RoundRecord:
    return record_of({kind: [{"site": site} for site in sites] for kind, sites in kinds.items()})


def test_quarantine_counts_rejections_in_a_row() -> None:
    bad, good, away = round_of(rejected=["a"]), round_of(accepted=["a"]), round_of(failed=["a"])
    assert quarantined([bad, bad], None) == frozenset()
    assert quarantined([bad, good, bad], 2) == frozenset()
    assert quarantined([bad, away, round_of(), bad], 2) == {"a"}
    assert quarantined([bad, bad, bad], 2) == {"a"}
    assert quarantined([bad, bad, round_of(probed=["a"])], 2) == frozenset()
    assert quarantined([round_of(rejected=["a"], accepted=["a"])] * 3, 2) == frozenset()  # its second attempt passed
