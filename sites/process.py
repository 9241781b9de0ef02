"""Client scripts as processes of their own: how a site of a proof of concept or of production runs them.

Between the host and the script stands a guard, the leader of their process group: it waits on a pipe whose other end the host
holds, so that the whole group dies with the host, however the host dies. `python -m fedpool.sites.process COMMAND...` is
the guard.
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

from fedpool.errors import FedpoolError
from fedpool.sites.launcher import Script

_GUARD = (sys.executable, "-m", "fedpool.sites.process")


class ProcessLauncher:
    """Starts each script in an interpreter of its own. Thread-safe.

    Args:
        command: what runs Python: "python", or e.g. "torchrun --nproc-per-node 2".
        threads: torch, OpenMP and BLAS threads of every script.
        imports: what the script imports from outside its bundle.
    """

    def __init__(self, command: str, *, threads: int, imports: Sequence[str]) -> None:
        words = shlex.split(command)
        # What was installed with this Python comes first, whether or not its folder is on the PATH.
        beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        program = sys.executable if words[0] == "python" else shutil.which(words[0], path=beside)
        self._command = [program or words[0], *words[1:]]
        self._threads = threads
        self._imports = list(imports)

    def start(
        self, script: Path, *, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seed: int
    ) -> Script:
        """See `Launcher.start`."""
        request = {
            "script": str(script),
            "arguments": list(arguments),
            "imports": self._imports,
            "folder": str(folder),
            "threads": self._threads,
            "seed": seed,
        }
        limits = {f"{name}_NUM_THREADS": str(self._threads) for name in ("OMP", "MKL", "OPENBLAS")}
        output, output_end = os.pipe()
        status, status_end = os.pipe()
        try:
            process = subprocess.Popen(
                [*_GUARD, *self._command, "-m", "fedpool.sites.script", json.dumps(request)],
                env={**os.environ, **limits, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.PIPE,
                stdout=output_end,
                stderr=output_end,
                start_new_session=True,
            )
        except OSError as error:
            for end in (output, status, status_end):
                os.close(end)
            raise FedpoolError(f"the client script could not be started with {self._command[0]!r}: {error}") from error
        finally:
            os.close(output_end)
        threading.Thread(target=_tell_end, args=(process, status_end), daemon=True).start()
        return Script(process.pid, output, status)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """See `Launcher.kill`."""
        with suppress(ProcessLookupError):
            os.killpg(pid, number)


def _tell_end(process: "subprocess.Popen[bytes]", status: int) -> None:
    code = process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the script started and left behind
    assert process.stdin is not None
    process.stdin.close()
    with suppress(BrokenPipeError):  # nobody listens any more
        os.write(status, str(code).encode())
    os.close(status)


def guard(command: Sequence[str]) -> None:
    """Run a command and end as it ends; die with it, and all it started, when standard input ends."""

    def die_with_host() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    lifeline = threading.Thread(target=die_with_host, daemon=True)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error}")
    lifeline.start()
    code = process.wait()
    if code < 0:  # end by the same signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    guard(sys.argv[1:])
