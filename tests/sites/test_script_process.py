"""Client scripts as processes: how they start and end, and that none outlives its host."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import pytest

from fedpool.sites.launcher import Script
from fedpool.sites.script_process import ProcessLauncher
from tests.poc import scripts_of, wait_until, wait_until_gone


@pytest.fixture
def start(write_script: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[ProcessLauncher, Script]]:
    """Starts a script, given its text."""

    def start(
        text: str, *, command: str = "python", threads: int = 1, imports: tuple[str, ...] = ()
    ) -> tuple[ProcessLauncher, Script]:
        launcher = ProcessLauncher(command, threads=threads, imports=imports, environment=os.environ)
        environment = {"GREETING": "hello", "FEDPOOL_TEST": str(tmp_path)}
        script = launcher.start(
            write_script(text), arguments=["a b", "--c"], environment=environment, folder=tmp_path, seed=7
        )
        return launcher, script

    return start


def finish(script: Script, timeout_s: float = 60) -> tuple[str, int]:
    """What a script prints, and its exit code."""
    output = b""
    open_end = True
    while open_end:
        assert wait([script.output], timeout_s), "it neither prints nor ends"
        data = os.read(script.output, 1 << 16)
        output += data
        open_end = bool(data)
    assert wait([script.status], timeout_s)
    code = int(os.read(script.status, 32))
    os.close(script.output)
    os.close(script.status)
    return output.decode(), code


def test_a_script_gets_arguments_environment_folder_and_threads(
    start: Callable[..., tuple[ProcessLauncher, Script]], tmp_path: Path
) -> None:
    _, script = start(
        """
        import json, os, sys
        print(json.dumps([sys.argv[1:], os.environ["GREETING"], os.getcwd(), os.environ["OMP_NUM_THREADS"], __name__]))
        """,
        threads=3,
    )
    output, code = finish(script)
    assert json.loads(output) == [["a b", "--c"], "hello", str(tmp_path), "3", "__main__"] and code == 0


def test_two_scripts_of_one_seed_draw_the_same_numbers(start: Callable[..., tuple[ProcessLauncher, Script]]) -> None:
    text = "import random, numpy; print(random.random(), numpy.random.rand())"
    scripts = [start(text, imports=("random", "numpy"))[1] for _ in range(2)]
    assert len({finish(script) for script in scripts}) == 1


@pytest.mark.parametrize(
    ("text", "code", "printed"),
    [
        ("raise SystemExit(5)", 5, ""),
        ("raise SystemExit('no data')", 1, "no data"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
    ],
)
def test_the_exit_code_is_the_scripts_own(
    text: str, code: int, printed: str, start: Callable[..., tuple[ProcessLauncher, Script]]
) -> None:
    output, ended = finish(start(text)[1])
    assert ended == code and printed in output
    assert "runpy" not in output


def test_a_killed_script_takes_its_children_with_it(
    start: Callable[..., tuple[ProcessLauncher, Script]], tmp_path: Path
) -> None:
    launcher, script = start(
        """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        child.wait()
        """
    )
    child = psutil.Process(int(os.read(script.output, 32)))
    launcher.kill(script.pid)
    assert finish(script)[1] == -signal.SIGKILL
    psutil.wait_procs([child], timeout=120)
    assert not child.is_running()
    wait_until_gone(scripts_of, tmp_path)
    launcher.kill(script.pid)  # harmless


def test_what_a_script_leaves_running_ends_with_it(start: Callable[..., tuple[ProcessLauncher, Script]]) -> None:
    _, script = start(
        """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
        print(child.pid, flush=True)
        """
    )
    output, code = finish(script)
    assert code == 0
    wait_until(lambda: not psutil.pid_exists(int(output)), timeout_s=400)


HOST = """
    import os, sys
    from pathlib import Path
    from fedpool.sites.script_process import ProcessLauncher

    launcher = ProcessLauncher("python", threads=1, imports=(), environment=os.environ)
    folder = Path(sys.argv[1])
    launcher.start(folder / "client.py", arguments=(), environment={"FEDPOOL_TEST": str(folder)}, folder=folder, seed=0)
    sys.stdin.read()
"""


def test_a_host_that_is_killed_takes_its_script_with_it(write_script: Callable[..., Path], tmp_path: Path) -> None:
    write_script("import pathlib, time; pathlib.Path('runs').touch(); time.sleep(600)")
    command = [sys.executable, "-c", textwrap.dedent(HOST), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as host:
        wait_until((tmp_path / "runs").exists)
        assert len(scripts_of(tmp_path)) == 2  # the script and its guard
        host.kill()
    wait_until_gone(scripts_of, tmp_path, 10)


def test_a_command_that_is_not_there_is_named(start: Callable[..., tuple[ProcessLauncher, Script]]) -> None:
    output, code = finish(start("pass", command="no-such-program --fast")[1])
    assert code == 1 and "no-such-program cannot be run" in output


def test_torchrun_starts_one_script_for_each_process(start: Callable[..., tuple[ProcessLauncher, Script]]) -> None:
    _, script = start(
        # in one write each, because the two share a pipe
        "import os, sys; os.write(1, f\"{os.environ['RANK']} of {os.environ['WORLD_SIZE']} {sys.argv[1:]}\\n\".encode())",
        command="torchrun --nproc-per-node 2",
    )
    output, code = finish(script, 120)
    assert code == 0, output
    for rank in (0, 1):
        assert f"{rank} of 2 ['a b', '--c']" in output
