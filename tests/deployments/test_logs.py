"""What a simulated site's script prints: always in a file in the job's folder, and in the terminal
on request.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpool import JobFailed, Run
from fedpool.sites.site_log import MAX_BYTES, SiteLog

SPEAKS = """
    import fedpool.client as flare

    flare.init()
    print("ready [bold]")
    while flare.is_running():
        model = flare.receive()
        print("training at", flare.get_site_name())
        flare.send(flare.FLModel(params=model.params))
"""


def lines(run: Run, site: str) -> list[str]:
    return (Path(run.path) / "logs" / f"{site}.log").read_text().splitlines()


def test_each_site_has_a_log_file_with_time_and_round(
    run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_job(SPEAKS)
    run.get_result()
    for site in ("site-1", "site-2"):
        texts = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (round .*)", line) for line in lines(run, site)]
        assert [text and text[1] for text in texts] == [
            "round 0: ready [bold]",
            f"round 0: training at {site}",
            f"round 1: training at {site}",
        ]
    assert "training at" not in capsys.readouterr().out


@pytest.mark.parametrize("progress", [True, False])
def test_the_terminal_shows_what_scripts_print_when_it_is_asked_to(
    progress: bool, run_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_job(SPEAKS, env={"logs": "console", "progress": progress})
    run.get_result()
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("site-2 | ")] == [
        "site-2 | ready [bold]",
        *["site-2 | training at site-2"] * 2,
    ]
    assert (f"output of the scripts: {run.path}/logs" in shown) is progress


def test_the_log_file_has_the_traceback_and_why_the_round_failed(run_job: Callable[..., Run]) -> None:
    run = run_job("import fedpool.client\nprint('before')\n1 / 0", site_retries=0)
    with pytest.raises(JobFailed):
        run.get_result()
    text = "\n".join(lines(run, "site-1"))
    assert "round 0: before" in text
    assert "round 0: ZeroDivisionError: division by zero" in text
    assert text.endswith("round 0: failed: the script ended with exit code 1")


def test_a_log_file_is_bounded_and_its_end_is_there(tmp_path: Path) -> None:
    log = SiteLog(tmp_path / "logs" / "site-1.log")
    line = "x" * (MAX_BYTES // 10)
    for number in range(35):
        assert log.write(number, f"{number} {line}") is None
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["site-1.log", "site-1.log.1"]
    assert all(file.stat().st_size <= MAX_BYTES for file in files)
    texts = [text for file in reversed(files) for text in file.read_text().splitlines()]
    kept = [int(text.split(" round ")[1].split(":")[0]) for text in texts]
    assert kept == list(range(kept[0], 35)) and len(kept) >= 9


def test_a_log_file_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file, where the folder should be")
    log = SiteLog(tmp_path / "logs" / "site-1.log")
    problem = log.write(0, "first")
    assert problem is not None and "site-1.log cannot be written" in problem
    assert log.write(0, "second") is None
