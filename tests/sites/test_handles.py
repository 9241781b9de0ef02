"""File handles: the limit is raised if the system allows it; otherwise the job is refused early. If
handles run out, the error says so.
"""

import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedpool import ConfigError, Run, SiteError
from fedpool.client.hosts import Assignment
from fedpool.sites.handles import allow_scripts
from fedpool.sites.launcher import Launcher
from fedpool.sites.script_process import ProcessLauncher
from fedpool.sites.script_session import ScriptSession
from fedpool.sites.session import Work
from fedpool.sites.sockets import make_socket_folder
from fedpool.sites.zygote import Zygote
from tests.conftest import ADD_ONE

NONE_LEFT = (
    r"no file handles left \(Too many open files, `ulimit -n` is \d+\): raise the limit, or run fewer scripts at a time"
)

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets this process's limit on open files for the duration of a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda number: resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limit_with_free(num_free: int, pid: int) -> int:
    """The limit on open files that leaves a process `num_free` handles."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    number = 0
    while number - sum(handle < number for handle in used) < num_free:
        number += 1
    return number


def session_of(launcher: Launcher, folder: Path, script: Path) -> ScriptSession:
    sockets = folder / "sockets"
    sockets.mkdir()
    return ScriptSession(Work("job", "site-1", script), launcher, folder=sockets, workdir=folder)


@needs_proc
@pytest.mark.parametrize("free", [1, 2, 3])
def test_a_script_that_cannot_start_says_that_handles_ran_out_and_starts_later(
    free: int, limit: Callable[[int], None], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    session = session_of(
        ProcessLauncher("python", threads=1, imports=(), environment=os.environ), tmp_path, write_script(ADD_ONE)
    )
    limit(limit_with_free(free, os.getpid()))
    with pytest.raises(SiteError, match=f"site-1, round 0: the client script could not be started: .*{NONE_LEFT}"):
        session.perform(Assignment(0, 1), deadline=None, log=print)
    limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert session.perform(Assignment(0, 1), deadline=None, log=print).update["params_type"] == "FULL"
    session.end()


@needs_proc
def test_a_zygote_without_handles_says_so_and_goes_on(write_script: Callable[..., Path], tmp_path: Path) -> None:
    zygote = Zygote(threads=1)
    zygote.preload(())
    session = session_of(zygote, tmp_path, write_script(ADD_ONE))
    (process,) = [p for p in psutil.Process().children() if "fedpool.sites.zygote_process" in p.cmdline()]
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    zygote._ask({"kill": 0})  # it has imported all it needs
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit_with_free(1, process.pid), hard))
    with pytest.raises(SiteError, match=f"could not be started: .*{NONE_LEFT}"):
        session.perform(Assignment(0, 1), deadline=None, log=print)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert session.perform(Assignment(0, 1), deadline=None, log=print).update["params_type"] == "FULL"
    session.end()
    zygote.close()


def test_the_limit_is_raised_for_many_scripts_and_never_lowered(limit: Callable[[int], None]) -> None:
    limit(300)
    allow_scripts(100, 100, remedy="")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256 + 400
    allow_scripts(1, 1, remedy="")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256 + 400


def test_more_scripts_than_the_system_allows_are_refused_before_anything_starts(
    run_job: Callable[..., Run], tmp_path: Path
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    sites = hard // 3 + 1
    with pytest.raises(
        ConfigError, match=rf"{sites} client scripts .* this process may have only {hard}.*keep_alive=False"
    ):
        run_job(env={"num_clients": sites})
    assert not list((tmp_path / "runs").glob(".fedpool*"))


@pytest.fixture
def long_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, as set by a TMPDIR of over 200 bytes."""
    folder = tmp_path / ("x" * 200)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_long_folder_for_temporary_files_does_not_matter(
    long_temporary_folder: Path, run_job: Callable[..., Run]
) -> None:
    assert run_job().get_result().params["w"].tolist() == [2, 2, 2]


def test_sockets_fit_where_temporary_files_are_too_deep(long_temporary_folder: Path) -> None:
    folder = make_socket_folder()
    try:
        assert not folder.is_relative_to(long_temporary_folder)
        (folder / "99999").mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "99999" / "s"))
    finally:
        shutil.rmtree(folder)
