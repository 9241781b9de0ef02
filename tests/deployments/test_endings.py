"""What a script does after its last round never fails the job, and is reported where users look."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedpool import JobStatus, Run
from fedpool.deployments.endings import read_endings
from fedpool.deployments.progress import summarize
from fedpool.flows.stored import recipe_of
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.job_record import JobResult
from fedpool.tasks.report.tables import final_report
from tests.records import record_of
from tests.records import result_of as ended

pytestmark = pytest.mark.usefixtures("leaves_nothing")

SCRIPT = """
    import os, pathlib, signal, sys, threading
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        print("Traceback (most recent call last) of an error that the script has handled")
        flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
    if flare.get_site_name() == "site-2":
        ENDING
"""

ENDINGS: dict[str, tuple[str, str]] = {
    "exits": ("sys.exit(3)", "the script ended with exit code 3"),
    "exits with words": ('sys.exit("the disk is full")', "the script ended with exit code 1\nthe disk is full"),
    "raises": (
        'raise ValueError("the report could not be written")',
        "the script ended with exit code 1\nTraceback (most recent call last):",
    ),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "the script was killed by SIGSEGV"),
    "raises after shutdown": ('flare.shutdown(); raise ValueError("late")', "the script ended with exit code 1"),
    "does not end": (
        "threading.Event().wait()",
        "the script was still running 10 s after the end of the job, and was killed",
    ),
}


def result_of(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(run.path) / "result.json").read_text())
    return result


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_that_fails_after_its_last_round_is_named_and_the_job_completes(
    ending: str, run_job: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    code, how = ENDINGS[ending]
    run = run_job(SCRIPT.replace("ENDING", code))
    assert run.get_status() is JobStatus.COMPLETED
    result = run.get_result()
    assert list(result.endings) == ["site-2"]
    assert how in result.endings["site-2"]
    assert "has handled" not in result.endings["site-2"]
    if "raise" in code:
        assert "ValueError: " in result.endings["site-2"]
    assert result.params["w"].tolist() == [2, 2, 2]
    written = result_of(run)
    assert written["endings"] == result.endings
    assert f"site-2: after its last round, {how}" in caplog.text
    assert f"- **site-2 failed after its last round**:\n\n```\n{how[:20]}" in final_report(
        "test", JobResult.read(Store(str(Path(run.path).parent)), f"{run.job_id}/result.json"), result.records
    )
    shown = StringIO()
    folder = Path(run.path)
    store = Store(str(folder.parent))
    summarize(run, recipe_of(folder.name, store), Console(file=shown, width=200))
    assert f"site-2: after its last round, {how.splitlines()[0]}" in shown.getvalue()
    assert verify_job(store, folder.name).status == "COMPLETED"


def test_a_script_that_ends_well_is_not_named(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT.replace("ENDING", "sys.exit(0)"))
    assert run.get_result().endings == {}
    assert result_of(run)["endings"] == {}


def test_a_script_may_go_on_after_shutdown(
    run_job: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = 'flare.shutdown(); threading.Event().wait(0.5); pathlib.Path("after").touch()'
    assert run_job(SCRIPT.replace("ENDING", code)).get_result().endings == {}
    assert (tmp_path / "after").exists()


def test_scripts_that_are_started_for_each_round_are_named_too(run_job: Callable[..., Run]) -> None:
    result = run_job(SCRIPT.replace("ENDING", "sys.exit(3)"), env={"keep_alive": False}).get_result()
    assert result.endings == {"site-2": "the script ended with exit code 3"}


def test_of_a_job_that_is_cancelled_no_ending_is_named(run_job: Callable[..., Run], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    script = f"""
        import pathlib, threading
        import fedpool.client as flare
        flare.init()
        flare.receive()
        pathlib.Path({str(begun)!r}).touch()
        threading.Event().wait()
    """
    run = run_job(script, wait=False)
    while not begun.exists() and not run.wait(0.05):
        pass
    run.abort()
    assert run.wait(300)
    assert result_of(run)["endings"] == {}


def test_what_a_site_says_of_its_ending_need_not_be_sound(tmp_path: Path) -> None:
    store, paths = Store(str(tmp_path)), JobPaths("job-1")
    record = record_of({"accepted": [{"site": f"site-{number}"} for number in (1, 2, 3, 4, 10)]})
    for site, data in (
        ("site-10", b'{"how": "exit code 3"}'),
        ("site-2", b"no JSON"),
        ("site-3", b'{"how": "' + b"x" * 100_000 + b'"}'),
        ("site-4", b"[]"),
    ):
        store.write_bytes(paths.ending(0, site), data)
    found = read_endings(store, "job-1", ended({}), [record])
    assert list(found) == ["site-2", "site-3", "site-4", "site-10"]
    assert found["site-10"] == "exit code 3"
    assert "cannot be read" in found["site-2"] and "cannot be read" in found["site-4"]
    assert "is longer than 65536 bytes" in found["site-3"]
