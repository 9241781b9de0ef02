"""Client scripts that fail: each ends in an error or a rejected update that names the site, the
round and the cause.
"""

import importlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import JobFailed, JobStatus, Run
from fedpool.sites.output import MAX_LINE_BYTES, MAX_LINES_PER_ROUND
from tests.own_algorithm import importable

pytestmark = pytest.mark.usefixtures("leaves_nothing")

# site-2 goes wrong in round 1; everything else is as it should be.
SCRIPT = """
    import os, signal, sys, threading
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        params = {{name: value + 1 for name, value in model.params.items()}}
        if flare.get_site_name() == "site-2" and model.current_round == 1:
            {fault}
        flare.send(flare.FLModel(params=params))
"""

FAULTS: dict[str, tuple[str, str]] = {
    "raises": ('raise ValueError("my own error")', "ValueError: my own error"),
    "raises deep": ("np.zeros(3).reshape(2, 2)", "cannot reshape array"),
    "exits": ("os._exit(3)", "ended with exit code 3"),
    "exits quietly": ("os._exit(0)", "ended without sending an update"),
    "calls sys.exit": ('sys.exit("out of data")', "out of data"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "shuts down": ("flare.shutdown()", "called flare.shutdown() before the job was over"),
    "sends NaN": ('params["w"][1] = np.nan', "not_finite"),
    "sends infinity": ('params["w"][1] = np.inf', "not_finite"),
    "sends a wrong shape": ('params["w"] = params["w"].reshape(1, 3)', "w: expected [3], got [1, 3]"),
    "renames a key": ('params = {"v": params["w"]}', "unknown_parameter"),
    "leaves a key out": ('params.pop("b")', "missing_parameter"),
    "swaps the dtype": ('params["w"] = params["w"].astype(np.int64)', "w: expected F32, got I64"),
    "sends no params": ('flare.send(flare.FLModel(metrics={"accuracy": 1})); continue', "no_params"),
    "sends a bad weight": (
        'flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": float("nan")})); continue',
        "its weight is nan",
    ),
    "sends a negative weight": (
        'flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": -1})); continue',
        "its weight is -1",
    ),
    "sends a weight that no float holds": (
        'flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 10**400})); continue',
        "its weight is inf",
    ),
    "sends a weight beyond max_weight": (
        'flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 1e300})); continue',
        "its weight is 1e+300, max_weight is 1e+12",
    ),
    "sends seventy thousand metrics": (
        "flare.send(flare.FLModel(params=params, metrics={str(n): 0.5 for n in range(70_000)})); continue",
        "ClientError: metrics cannot be sent: it has 70000 entries, but at most 1000 are allowed",
    ),
    "sends a note of its own to its host": (
        "import gc; from fedpool.client.link import Link; "
        "link = next(each for each in gc.get_objects() if isinstance(each, Link)); "
        'link.put("update", round=1, metrics={"accuracy": "none"}, meta={}, params_type=None); continue',
        "sent its host a message that is not valid: update.metrics.accuracy: Input should be a valid number",
    ),
    "forgets to send": ("continue", "ClientError: round 1 at site-2: send() was not called before the next"),
    "misuses the client API": ("flare.send(params)", "send() takes a flare.FLModel, got dict"),
}


def records(run: Run) -> list[dict[str, Any]]:
    """The rounds that a job committed."""
    return [json.loads(path.read_text()) for path in sorted(Path(run.path).glob("rounds/*/round.json"))]


MODEL = {"w": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_job_with_site_round_and_cause_when_the_site_is_needed(
    fault: str, run_job: Callable[..., Run]
) -> None:
    code, cause = FAULTS[fault]
    run = run_job(SCRIPT.format(fault=code), model=MODEL)
    assert run.get_status() is JobStatus.FAILED
    with pytest.raises(JobFailed) as caught:
        run.get_result()
    message = str(caught.value)
    assert "site-2" in message and "round 1" in message and cause in message
    assert "site-1" not in message  # it did nothing wrong
    assert [record["round"] for record in records(run)] == [0]  # the committed round stays


@pytest.mark.parametrize("fault", ["raises", "sends NaN", "is killed"])
def test_a_fault_is_recorded_and_the_job_goes_on_when_enough_sites_remain(
    fault: str, run_job: Callable[..., Run]
) -> None:
    code, cause = FAULTS[fault]
    result = run_job(SCRIPT.format(fault=code), model=MODEL, min_clients=1, num_rounds=3).get_result()
    second = result.rounds[1]
    assert [entry["site"] for entry in second["accepted"]] == ["site-1"]
    assert cause in json.dumps(second["failed"] + second["rejected"]).replace("\\n", "\n")
    assert [len(record["accepted"]) for record in result.rounds] == [2, 1, 2]  # a failed site gets a fresh script
    np.testing.assert_array_equal(result.params["w"], np.full(3, 3))


def test_the_traceback_of_the_script_is_in_the_error_and_ours_is_not(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT.format(fault="np.zeros(3).reshape(2, 2)"), model=MODEL)
    with pytest.raises(JobFailed) as caught:
        run.get_result()
    message = str(caught.value)
    assert 'client.py", line 11' in message and "np.zeros(3).reshape(2, 2)" in message
    assert "zygote" not in message and "runpy" not in message


def test_a_script_that_hangs_past_round_timeout_is_killed_with_its_children(run_job: Callable[..., Run]) -> None:
    fault = "import subprocess; subprocess.Popen(['sleep', '600']); threading.Event().wait()"
    run = run_job(SCRIPT.format(fault=fault), model=MODEL, round_timeout=4)
    with pytest.raises(JobFailed, match=r"(?s)round 1.*site-2 failed: sent no update before the round's deadline"):
        run.get_result()


def test_sites_that_never_got_a_slot_before_round_timeout_are_named(run_job: Callable[..., Run]) -> None:
    script = """
        import threading
        import fedpool.client as flare
        flare.init()
        flare.receive()
        threading.Event().wait()
    """
    run = run_job(script, env={"num_threads": 1}, round_timeout=2, min_clients=1)
    with pytest.raises(JobFailed, match="no slot was free before the round's deadline"):
        run.get_result()


def longest_log(run: Run) -> list[str]:
    """The lines of the site's log that has the most."""
    return max((path.read_text().splitlines() for path in Path(run.path, "logs").iterdir()), key=len)


def test_a_script_that_prints_10_mb_neither_hangs_nor_floods_the_log(run_job: Callable[..., Run]) -> None:
    fault = 'print("\\n".join("x" * 100 for _ in range(100_000)))'
    run = run_job(SCRIPT.format(fault=fault), model=MODEL)
    assert run.get_result().num_rounds == 2
    lines = longest_log(run)
    assert sum("xxx" in line for line in lines) == MAX_LINES_PER_ROUND
    assert any("99000 more lines, not shown" in line for line in lines)


def test_a_line_of_10_mb_is_cut(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT.format(fault='print("x" * 10_000_000)'), model=MODEL)
    assert run.get_result().num_rounds == 2
    lines = longest_log(run)
    assert max(map(len, lines)) < 2 * MAX_LINE_BYTES
    assert sum("xxx" in line for line in lines) <= MAX_LINES_PER_ROUND


def test_a_script_that_fails_before_init_says_so(run_job: Callable[..., Run]) -> None:
    run = run_job("import a_module_that_is_not_installed\n")
    with pytest.raises(
        JobFailed, match=r"(?s)round 0.*site-1, site-2 failed.*No module named 'a_module_that_is_not_installed'"
    ):
        run.get_result()


def test_an_evaluation_that_fails_does_not_cost_the_trained_model(run_job: Callable[..., Run]) -> None:
    script = """
        import fedpool.client as flare
        flare.init()
        while flare.is_running():
            model = flare.receive()
            if flare.is_evaluate():
                raise RuntimeError("cannot score")
            flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"accuracy": 0.5}))
    """
    result = run_job(script).get_result()
    assert result.num_rounds == 2 and float(result.params["w"][0]) == 2
    assert [entry["cause"].splitlines()[-1] for entry in result.rounds[-1]["failed"]] == [
        "RuntimeError: cannot score"
    ] * 2
    assert result.best_round == 0  # the only scores are those of the first two models, which are equal


LEAVING = """
    from fedpool import ElementwiseFilter, FedAvgRecipe
    from fedpool.flows.fedavg import FedAvg

    def leaves(values, weights):
        raise SystemExit(3)

    class Leaves(FedAvg):
        def apply(self, state, updates):
            raise SystemExit(3)

    class LeavesRecipe(FedAvgRecipe):
        def strategy(self, num_sites):
            return Leaves(self.rule)

    class LeavesFilter(ElementwiseFilter):
        def outgoing_values(self, values, block, context):
            raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            lambda own: {"kind": own.LeavesRecipe},
            r"Leaves\.apply failed at parameter w: SystemExit: 3 \(.*leaving\.py, line",
        ),
        (lambda own: {"aggregator": own.leaves}, r"aggregator leaving:leaves failed at parameter w: SystemExit: 3 \("),
        (
            lambda own: {"filters": (own.LeavesFilter(),)},
            "site-2.*its update cannot leave: filter LeavesFilter: SystemExit: 3",
        ),
    ],
)
def test_code_of_the_algorithm_that_exits_fails_the_job_and_does_not_cancel_it(
    run_job: Callable[..., Run], tmp_path: Path, fields: Callable[[Any], dict[str, Any]], words: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "leaving.py").write_text(textwrap.dedent(LEAVING))
    with importable(folder):
        run = run_job(num_rounds=1, **fields(importlib.import_module("leaving")))
        assert run.get_status() is JobStatus.FAILED
        with pytest.raises(JobFailed, match=rf"(?s){words}"):
            run.get_result()
