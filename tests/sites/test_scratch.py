"""Scratch folders: a process removes its own, and the next removes those of killed processes."""

import signal
import subprocess
import sys
from pathlib import Path

from fedpool.sites.scratch import Scratch

HOLDER = """
import pathlib, sys
from fedpool.sites.scratch import Scratch
scratch = Scratch(pathlib.Path(sys.argv[1]), ".mine-")
(scratch.path / "file").touch()
print(scratch.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_of_a_killed_process_goes_when_the_next_one_comes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        (tmp_path / "other").mkdir()
        first = Scratch(tmp_path, ".mine-")
        assert theirs.exists()  # its process lives
        process.send_signal(signal.SIGKILL)
        process.wait()
    second = Scratch(tmp_path, ".mine-")
    assert not theirs.exists() and first.path.exists() and (tmp_path / "other").exists()
    for scratch in (first, second, second):
        scratch.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
