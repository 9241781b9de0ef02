"""`fedpool migrate` on the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "import nvflare.client as flare\nfrom nvflare.recipe import SimEnv\n\nflare.init()\n"
AFTER = SCRIPT.replace("nvflare.client", "fedpool.client")


def fedpool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedpool.cli", "migrate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "client.py"
    path.write_text(SCRIPT)
    path.chmod(0o750)
    return path


def test_it_rewrites_the_file_and_says_what_is_left(script: Path) -> None:
    ran = fedpool(script)
    assert ran.returncode == 0, ran.stderr
    assert script.read_text() == AFTER
    assert script.stat().st_mode & 0o777 == 0o750
    first, second = ran.stdout.splitlines()
    assert first == f"{script}: 1 line rewritten, 1 left to look at"
    assert second.startswith(f"{script}:2: nvflare.recipe.SimEnv: this describes a job: write a fedpool recipe")
    assert sorted(path.name for path in script.parent.iterdir()) == ["client.py"]


def test_diff_shows_it_and_changes_nothing_unless_it_is_told_to(script: Path) -> None:
    ran = fedpool(script, "--diff")
    assert "-import nvflare.client as flare\n+import fedpool.client as flare\n" in ran.stdout
    assert "1 line to rewrite" in ran.stdout
    assert script.read_text() == SCRIPT
    assert "1 line rewritten" in fedpool(script, "--diff", "--write").stdout
    assert script.read_text() == AFTER


def test_a_folder_is_migrated_whole_and_a_file_that_is_not_python_stays(script: Path) -> None:
    (script.parent / "lib").mkdir()
    (script.parent / "lib" / "model.py").write_text("from nvflare.client import FLModel\n")
    (script.parent / "bad.py").write_text("import nvflare.client as flare\nprint 'x'\n")
    (script.parent / "other.py").write_text("print 'not ours'\n")
    ran = fedpool(script.parent)
    assert ran.returncode == 1
    assert "other.py" not in ran.stderr
    assert "bad.py:2 is not Python, so it was left as it is" in ran.stderr
    assert (script.parent / "bad.py").read_text().startswith("import nvflare")
    assert script.read_text() == AFTER
    assert (script.parent / "lib" / "model.py").read_text() == "from fedpool.client import FLModel\n"


def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    ran = fedpool(tmp_path / "none.py")
    assert ran.returncode == 1
    assert ran.stderr.strip() == f"{tmp_path / 'none.py'} does not exist"
