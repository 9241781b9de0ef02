"""Client scripts as separate processes, as sites outside a simulation run them.

A guard stands between the host and the script. It waits on a pipe whose other end the host holds,
so the script and everything it started die with the host, however the host dies. The guard adopts
processes that leave the script's session, so none escapes. The guard is `python -m
fedpool.sites.script_process COMMAND...`.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedpool.sites.descendants import adopt_orphans, end_children, kill, kill_group, own_children
from fedpool.sites.launcher import Script
from fedpool.sites.other_user import as_user

_GUARD = (sys.executable, "-m", "fedpool.sites.script_process")
_SAFE = {"PYTHONSAFEPATH": "1"}
"""Keeps the current folder off `sys.path`: earlier scripts may have left modules there."""


def find_program(command: str) -> list[str]:
    """Split a command that runs Python scripts into words, with the program's path if it is found.

    Raises:
        ValueError: the command is empty, or its quotes do not match.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"command {command!r} cannot be split into words ({error}): balance its quotes") from None
    if not words:
        raise ValueError('command is empty: write "python"')
    # Programs that were installed with this Python come first, even if they are not on the PATH.
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = sys.executable if words[0] == "python" else shutil.which(words[0], path=beside)
    return [program or words[0], *words[1:]]


class ProcessLauncher:
    """Starts each script in its own interpreter. Thread-safe.

    Args:
        command: command that runs Python: "python", or e.g. "torchrun --nproc-per-node 2".
        threads: torch, OpenMP and BLAS threads of every script.
        imports: modules outside its bundle that the script imports.
        environment: variables of every script.
        beside: a folder in which those modules may be, too.
        sandbox: words before the command that limit what it reaches; see `fedpool.sites.sandbox`.
        limits: resource limits of the script's processes.
        user: the user that scripts run as, if not this one.
    """

    def __init__(
        self,
        command: str,
        *,
        threads: int,
        imports: Sequence[str],
        environment: Mapping[str, str],
        beside: Path | None = None,
        sandbox: Sequence[str] = (),
        limits: Mapping[str, int] | None = None,
        user: str | None = None,
    ) -> None:
        self._command = find_program(command)
        self._threads = threads
        self._imports = list(imports)
        self._environment = dict(environment)
        self._beside = None if beside is None else str(beside)
        self._sandbox = list(sandbox)
        self._limits = dict(limits or {})
        self._user = as_user(user)
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(
        self, script: Path, *, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seed: int
    ) -> Script:
        """See `Launcher.start`."""
        request = {
            "script": str(script),
            "arguments": list(arguments),
            "imports": self._imports,
            "beside": self._beside,
            "folder": str(folder),
            "threads": self._threads,
            "seed": seed,
            "limits": self._limits,
        }
        limits = {f"{name}_NUM_THREADS": str(self._threads) for name in ("OMP", "MKL", "OPENBLAS")}
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            output, output_end, status, status_end = ends
            process = subprocess.Popen(
                [*_GUARD, *self._sandbox, *self._command, "-m", "fedpool.sites.script", json.dumps(request)],
                env={**self._environment, **limits, **_SAFE, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.PIPE,
                stdout=output_end,
                stderr=output_end,
                start_new_session=True,
                **self._user,
            )
        except OSError:
            for end in ends:
                os.close(end)
            raise
        os.close(output_end)
        self._running[process.pid] = process
        threading.Thread(target=self._tell_end, args=(process, status_end), daemon=True).start()
        return Script(process.pid, output, status)

    def kill(self, pid: int) -> None:
        """See `Launcher.kill`."""
        if (process := self._running.get(pid)) is not None:
            _let_go(process)
            kill(pid, signal.SIGCONT)  # the script may have stopped its group, which includes the guard

    def _tell_end(self, process: "subprocess.Popen[bytes]", status: int) -> None:
        code = process.wait()
        self._running.pop(process.pid, None)
        kill_group(process.pid)  # in case the guard itself was killed
        _let_go(process)
        with suppress(BrokenPipeError):  # the reader is gone
            os.write(status, str(code).encode())
        os.close(status)


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    """Close the pipe that keeps a guard and its script alive."""
    assert process.stdin is not None
    process.stdin.close()


def guard(command: Sequence[str]) -> None:
    """Run a command, and exit as it does once all its descendants are killed.

    When standard input ends, kill all of them at once.
    """
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A script may signal its whole group. Handlers, unlike SIG_IGN, are not inherited by the
        # command.
        signal.signal(number, lambda *_: None)
    let_go = threading.Event()

    def kill_with_host() -> None:
        while os.read(0, 4096):
            pass
        let_go.set()
        for pid in own_children():
            kill(pid)

    lifeline = threading.Thread(target=kill_with_host, daemon=True)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error}")
    lifeline.start()
    pid = 0
    while pid != process.pid:  # other pids are orphans
        pid, wait_status = os.waitpid(-1, 0)
    end_children()
    code = -signal.SIGKILL if let_go.is_set() else os.waitstatus_to_exitcode(wait_status)
    if code < 0:  # end by the same signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    guard(sys.argv[1:])
