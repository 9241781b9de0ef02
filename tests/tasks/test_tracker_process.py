"""A tracker's process writes what it is given, retries failed writes, and ends with its input."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpool.tasks.tracker_process import GAVE_UP, GRACE_S, WARNING
from tests.trackers import read_tensorboard, read_texts


class Tracker:
    """A process that writes TensorBoard's files."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedpool.tasks.tracker_process", "fedpool.tasks.tensorboard_writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def put(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def read_warning(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith(WARNING), line
        return line

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(120)


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    tracker = Tracker()
    try:
        yield tracker
    finally:
        tracker.process.kill()
        tracker.process.wait()
        for pipe in (tracker.process.stdin, tracker.process.stdout):
            assert pipe is not None
            pipe.close()


def begin(tracker: Tracker, folder: Path) -> None:
    params = {"lr": "0.1", "name": "a|b\nc"}
    tracker.put(do="begin", target=str(folder), job_id="job-1", name="mine", params=params)


def test_it_writes_what_it_was_given_when_whoever_gave_it_is_gone(tracker: Tracker, tmp_path: Path) -> None:
    begin(tracker, tmp_path)
    tracker.put(do="scalars", run="site-1", rows=[["loss", 1 / (n + 1), n, 1e9 + n] for n in range(1000)])
    tracker.put(do="scalars", run="site-1", rows=[["loss", 0.5, 1000, 1e9 + 1000.25], ["nan", float("nan"), 3, 5.0]])
    assert tracker.end() == 0  # it was never told that the job ended
    found = read_tensorboard(tmp_path / "site-1")
    assert [(step, when) for step, _, when in found["loss"][:-1]] == [(n, 1e9 + n) for n in range(1000)]
    assert [value for _, value, _ in found["loss"][:-1]] == pytest.approx([1 / (n + 1) for n in range(1000)])
    assert found["loss"][-1] == (1000, 0.5, 1e9 + 1000.25)
    assert found["nan"][0][1] != found["nan"][0][1]
    (text,) = read_texts(tmp_path / "server").values()
    assert "|lr|0.1|" in text and "|name|a\\|b c|" in text


def test_a_thousand_scalars_are_one_write_and_are_not_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpool.tasks.tensorboard_writer import make_writer  # it loads tensorboardX

    opened: list[Path] = []
    open_path = Path.open

    def opening(path: Path, mode: str) -> Any:
        opened.append(path)
        return open_path(path, mode)

    monkeypatch.setattr(Path, "open", opening)
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: pytest.fail("it was forced to disk"), raising=False)
    writer = make_writer()
    writer.begin(str(tmp_path), "job-1", "mine", {})
    opened.clear()
    writer.scalars("site-1", [("loss", 0.5, n, 1e9) for n in range(1000)])
    assert len(opened) == 1
    assert len(read_tensorboard(tmp_path / "site-1")["loss"]) == 1000


def test_what_fails_is_tried_again_in_order_until_it_works(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "logs").touch()  # a file where the folder should go
    begin(tracker, tmp_path / "logs")
    tracker.put(do="scalars", run="server", rows=[["a", 1.0, 0, 1.0]])
    assert "writing failed and is retried" in tracker.read_warning()
    (tmp_path / "logs").unlink()
    tracker.put(do="scalars", run="server", rows=[["a", 2.0, 1, 2.0]])
    assert tracker.end() == 0
    assert read_tensorboard(tmp_path / "logs/server")["a"] == [(0, 1.0, 1.0), (1, 2.0, 2.0)]


def test_after_the_end_it_gives_up_soon(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    begin(tracker, tmp_path / "logs")
    tracker.read_warning()
    drained = threading.Thread(target=lambda: tracker.process.stdout and tracker.process.stdout.read())
    drained.start()
    began = time.monotonic()
    assert tracker.end() == GAVE_UP
    assert time.monotonic() - began < GRACE_S + 30
    drained.join()
