"""Rounds that do not wait for every site: grace, over-sampling, late updates; and rounds that ask
sites again.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import JobFailed, Run
from fedpool.flows.verify import verify_job
from fedpool.store import Store

pytestmark = pytest.mark.usefixtures("leaves_nothing")

WAIT = """
    import sys
    import time
    from pathlib import Path
    import fedpool.client as flare

    def wait_for(path):
        while not path.exists():
            time.sleep(0.01)

    here = Path(sys.argv[1])
    flare.init()
    while flare.is_running():
        model = flare.receive()
        job = here / "runs" / flare.get_job_id() / "rounds"
        site, round = flare.get_site_name(), model.current_round
        {fault}
        flare.send(flare.FLModel(params={{name: value + 1 for name, value in model.params.items()}}))
"""
HANGS = "if site == 'site-2' and round == 0: wait_for(here / 'never')"


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["site"] for entry in entries]


@pytest.mark.parametrize("num_threads", [2, 3])
def test_a_hung_site_holds_up_a_round_for_its_grace_only(
    num_threads: int, run_job: Callable[..., Run], tmp_path: Path
) -> None:
    result = run_job(
        WAIT.format(fault=HANGS),
        env={"num_clients": 3, "num_threads": num_threads},
        train_args=[str(tmp_path)],
        num_rounds=4,
        quorum_grace=0.5,
    ).get_result()
    assert [names(record["accepted"]) for record in result.rounds] == [["site-1", "site-3"]] * 4
    assert [names(record["late"]) for record in result.rounds] == [["site-2"]] * 4  # it never comes back
    np.testing.assert_array_equal(result.params["w"], np.full(3, 4))
    assert verify_job(Store(tmp_path / "runs"), result.job_id).num_updates == 8


def test_a_late_update_is_kept_and_named_and_never_mixed_in(
    run_job: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault = """
        if site == 'site-2' and round == 0:
            wait_for(job / '00000/round.json')
            model.params = {name: value + 100 for name, value in model.params.items()}
        if site == 'site-1' and round == 1:
            wait_for(job / '00000/sites/site-2/update.json')
        if site == 'site-1' and round == 2:
            wait_for(job / '00002/sites/site-2/update.json')
    """
    with caplog.at_level(logging.WARNING):
        result = run_job(
            WAIT.format(fault=fault.strip()), train_args=[str(tmp_path)], num_rounds=3, min_clients=1, quorum_grace=1.0
        ).get_result()
    assert names(result.rounds[0]["late"]) == ["site-2"]
    assert "site-2" in names(result.rounds[2]["accepted"])  # it is back
    np.testing.assert_array_equal(result.params["w"], np.full(3, 3))
    kept = json.loads((tmp_path / "runs" / result.job_id / "rounds/00000/sites/site-2/update.json").read_text())
    assert (kept["round"], kept["attempt"]) == (0, 0)
    assert "site-2's update of round 0 arrived after that round had closed" in caplog.text
    verify_job(Store(tmp_path / "runs"), result.job_id)


def test_a_round_takes_the_first_of_more_sites_than_it_needs(run_job: Callable[..., Run], tmp_path: Path) -> None:
    result = run_job(
        WAIT.format(fault=HANGS),
        env={"num_clients": 4, "num_threads": 4},
        train_args=[str(tmp_path)],
        min_clients=1,
        clients_per_round=2,
        over_sample=2,
    ).get_result()
    for record in result.rounds:
        assert record["sites"] == ["site-1", "site-2", "site-3", "site-4"]
        assert len(record["accepted"]) == 2
        assert "site-2" not in names(record["accepted"])
        assert len(record["late"]) == 2


def test_a_script_that_fails_is_started_again_with_the_same_assignment(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    fault = """
        if site == 'site-2' and round == 1 and not (here / 'failed').exists():
            (here / 'failed').touch()
            raise ValueError('for once')
    """
    run = run_job(WAIT.format(fault=fault.strip()), train_args=[str(tmp_path)])
    assert [len(record["accepted"]) for record in run.get_result().rounds] == [2, 2]
    assert [entry["attempt"] for entry in run.get_result().rounds[1]["accepted"]] == [0, 0]


def test_without_retries_a_script_that_fails_has_failed(run_job: Callable[..., Run], tmp_path: Path) -> None:
    fault = """
        if site == 'site-2' and round == 1:
            (here / f'failed-{len(list(here.glob("failed-*")))}').touch()
            raise ValueError('again')
    """
    code = WAIT.format(fault=fault.strip())
    for retries in (0, 2):
        with pytest.raises(JobFailed, match="again"):
            run_job(code, train_args=[str(tmp_path)], site_retries=retries).get_result()
        assert len(list(tmp_path.glob("failed-*"))) == retries + 1
        for path in tmp_path.glob("failed-*"):
            path.unlink()


def test_a_round_without_quorum_asks_the_missing_sites_again_and_keeps_what_it_has(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    fault = """
        (here / f'{site}-{round}-{len(list(here.glob(f"{site}-{round}-*")))}').touch()
        if site == 'site-2' and round == 1 and len(list(here.glob('site-2-1-*'))) < 3:
            model.params = {'w': model.params['w'][:1]}
    """
    result = run_job(
        WAIT.format(fault=fault.strip()), train_args=[str(tmp_path)], round_retries=2, site_retries=0
    ).get_result()
    second = result.rounds[1]
    assert [(entry["site"], entry["attempt"]) for entry in second["accepted"]] == [("site-1", 0), ("site-2", 2)]
    assert [(entry["attempt"], entry["code"]) for entry in second["rejected"]] == [(0, "shape"), (1, "shape")]
    assert len(list(tmp_path.glob("site-1-1-*"))) == 1  # its update was already there
    assert verify_job(Store(tmp_path / "runs"), result.job_id).num_updates == 6


def test_a_round_that_fails_every_time_fails_the_job_with_the_cause_told_once(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    fault = "if site == 'site-2' and round == 1: raise ValueError('for good')"
    run = run_job(WAIT.format(fault=fault), train_args=[str(tmp_path)], round_retries=1, site_retries=0)
    with pytest.raises(JobFailed) as caught:
        run.get_result()
    assert str(caught.value).count("ValueError: for good") == 1  # although both attempts failed with it
    result = Store(tmp_path / "runs").read_json(f"{run.job_id}/result.json")
    assert result["final"]["round"] == 1  # the last committed model
