"""The host's side of the zygote, which forks client scripts in a simulation."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpool.errors import FedpoolError
from fedpool.sites.descendants import kill_group
from fedpool.sites.launcher import Script


class Zygote:
    """A running zygote process. Thread-safe; one per job.

    Args:
        threads: torch, OpenMP and BLAS threads of every script.
    """

    def __init__(self, *, threads: int) -> None:
        if not hasattr(os, "fork"):
            raise FedpoolError(
                "simulation forks client scripts, which this operating system does not support: use Linux or macOS"
            )
        ours, theirs = socket.socketpair()
        self._threads = threads
        self._control = ours
        self._lock = threading.Lock()
        limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedpool.sites.zygote_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **limits},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal must reach only the host, which ends the sessions in order
        )
        theirs.close()
        self._preloading: threading.Thread | None = None

    def preload(self, modules: Sequence[str]) -> None:
        """Begin to import modules in the zygote. Returns at once; the next `start` waits for them.

        Failed imports are left to the script, which will raise the error itself.
        """
        self._preloading = threading.Thread(target=self._ask, args=({"preload": list(modules)},), daemon=True)
        self._preloading.start()

    def start(
        self, script: Path, *, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seed: int
    ) -> Script:
        """See `Launcher.start`."""
        if self._preloading is not None:
            self._preloading.join()
        request = {
            "script": str(script),
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(folder),
            "threads": self._threads,
            "seed": seed,
        }
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            output, output_end, status, status_end = ends
            answer = self._ask({"fork": request}, [output_end, status_end])
            if "errno" in answer:
                raise OSError(answer["errno"], os.strerror(answer["errno"]))
        except (OSError, FedpoolError):
            for end in ends:
                os.close(end)
            raise
        os.close(output_end)
        os.close(status_end)
        return Script(answer["pid"], output, status)

    def kill(self, pid: int) -> None:
        """See `Launcher.kill`."""
        try:
            self._ask({"kill": pid})
        except FedpoolError:  # the zygote was killed before it could kill its scripts
            kill_group(pid)

    def close(self) -> None:
        """Kill all scripts, end the zygote and wait for it."""
        with self._lock:
            self._control.close()
        self._process.wait()

    def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        with self._lock:
            try:
                socket.send_fds(self._control, [json.dumps(request).encode() + b"\n"], fds)
                answer = b""
                while not answer.endswith(b"\n"):
                    more = self._control.recv(1 << 16)
                    if not more:
                        raise ConnectionResetError("it closed its socket")
                    answer += more
            except OSError as error:
                raise FedpoolError(f"the process that starts client scripts is gone ({error})") from error
        value: dict[str, Any] = json.loads(answer)
        return value
