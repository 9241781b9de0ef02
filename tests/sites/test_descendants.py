"""Processes that a script starts end with it, however it ends and even if they have left its
session: in simulation and at a site.
"""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import pytest

from fedpool.sites.launcher import Launcher, Script
from fedpool.sites.script_process import ProcessLauncher
from fedpool.sites.zygote import Zygote
from tests.poc import wait_until

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux lets a process adopt what has lost its parent"
)

# A child in its own session; a daemon, whose parent has ended; and the daemon's child. Each
# writes its pid, then sleeps.
FAMILY = """
    import os, pathlib, subprocess, sys, threading

    HERE = pathlib.Path(os.environ["HERE"])
    NAP = "import os, pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.with_suffix('.new').write_text(str(os.getpid())); " \\
          "p.with_suffix('.new').replace(p); time.sleep(600)"

    def nap(name):
        return subprocess.Popen([sys.executable, "-c", NAP, str(HERE / name)], start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    nap("own-session.pid")
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            nap("child-of-daemon.pid")
            (HERE / "daemon.new").write_text(str(os.getpid()))
            (HERE / "daemon.new").rename(HERE / "daemon.pid")
            threading.Event().wait()
        os._exit(0)
    os.wait()
    while not (HERE / "go").exists():
        threading.Event().wait(0.02)
    {end}
"""
NAMES = ("own-session.pid", "daemon.pid", "child-of-daemon.pid")


def zygote() -> Zygote:
    return Zygote(threads=1)


def process_launcher() -> ProcessLauncher:
    return ProcessLauncher("python", threads=1, imports=(), environment=os.environ)


@pytest.fixture(params=[zygote, process_launcher])
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    """Starts scripts as in a simulation, or as at a site."""
    made = request.param()
    yield made
    if isinstance(made, Zygote):
        made.close()


def begin(launcher: Launcher, folder: Path, end: str = "pass") -> tuple[Script, list[psutil.Process]]:
    """Start a script; returns it and the processes it started, once all of them run."""
    folder.mkdir(exist_ok=True)
    path = folder / "client.py"
    path.write_text(textwrap.dedent(FAMILY).replace("{end}", end))
    script = launcher.start(path, arguments=(), environment={"HERE": str(folder)}, folder=folder, seed=0)
    return script, family_of(folder)


def family_of(folder: Path) -> list[psutil.Process]:
    wait_until(lambda: all((folder / name).exists() for name in NAMES), timeout_s=400)
    return [psutil.Process(int((folder / name).read_text())) for name in NAMES]


def code_of(script: Script) -> int:
    assert wait([script.status], 60), "it does not end"
    code = int(os.read(script.status, 32))
    os.close(script.status)
    os.close(script.output)
    return code


def assert_gone(processes: list[psutil.Process]) -> None:
    left = psutil.wait_procs(processes, timeout=120)[1]
    for process in left:
        process.kill()
    assert left == []


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("os._exit(3)", 3), ("os.kill(os.getpid(), 9)", -9), ("os.killpg(0, 15)", -15)]
)
def test_a_script_that_ends_leaves_nothing_behind(end: str, code: int, launcher: Launcher, tmp_path: Path) -> None:
    script, family = begin(launcher, tmp_path, end)
    (tmp_path / "go").touch()
    assert code_of(script) == code
    assert_gone(family)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_script_that_is_killed_leaves_nothing_behind(stopped: bool, launcher: Launcher, tmp_path: Path) -> None:
    script, family = begin(launcher, tmp_path)
    if stopped:
        os.killpg(script.pid, signal.SIGSTOP)
    launcher.kill(script.pid)
    assert code_of(script) == -signal.SIGKILL
    assert_gone(family)


def test_what_other_scripts_have_started_lives_on(launcher: Launcher, tmp_path: Path) -> None:
    first, family = begin(launcher, tmp_path / "first")
    second, others = begin(launcher, tmp_path / "second")
    launcher.kill(first.pid)
    assert code_of(first) == -signal.SIGKILL
    assert_gone(family)
    assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in others)
    launcher.kill(second.pid)
    assert code_of(second) == -signal.SIGKILL
    assert_gone(others)


HELPED = """
    import os, subprocess, sys
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
"""


def test_what_an_import_has_started_for_all_scripts_lives_as_long_as_the_zygote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helped.py").write_text(textwrap.dedent(HELPED))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "client.py"
    path.write_text("import helped; print(helped.helper.pid, flush=True)")
    launcher = zygote()
    launcher.preload(("helped",))
    pids = set()
    for _ in range(2):
        script = launcher.start(path, arguments=(), environment={}, folder=tmp_path, seed=0)
        pids.add(int(os.read(script.output, 100)))
        assert code_of(script) == 0
    (helper,) = [psutil.Process(pid) for pid in pids]
    assert helper.status() != psutil.STATUS_ZOMBIE
    launcher.close()
    assert_gone([helper])


HOST = """
    import sys
    from pathlib import Path
    from tests.sites import test_descendants

    launcher = getattr(test_descendants, sys.argv[1])()
    test_descendants.begin(launcher, Path(sys.argv[2]))
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", [zygote, process_launcher])
def test_a_host_that_is_killed_leaves_nothing_behind(kind: Callable[[], Launcher], tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOST), kind.__name__, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=root) as host:
        family = family_of(tmp_path)
        host.kill()
    assert_gone(family)
