"""The zygote: a process that has imported what client scripts need, and forks scripts quickly.

`multiprocessing`'s own fork server runs the caller's `__main__` again in every child, so it would
run a user's `job.py` again. This one runs only the script that it is asked to. It has one thread,
so forking is safe. It is the parent of every script: when its control socket closes, because the
host ended or was killed, it kills all scripts and ends. When a script ends, everything it started
is killed, including processes that left its session. A running script adopts its own orphans; after
its end, the zygote does. So a child of the zygote that is not a script, and that no import started,
was left behind by a script that has ended.

Run as `python -m fedpool.sites.zygote_process FD`, where FD is a socket inherited from the host.
Each request is one JSON line. `{"preload": [...]}` is answered by `{"failed": {name: why}}`.
`{"fork": {...}}` comes with two file descriptors (the script's output, the status pipe), and is
answered by `{"pid": n}`, or `{"errno": n}` if it failed. `{"kill": pid}` is answered by `{"killed":
bool}`. When a script ends, its status pipe gets its exit code as a decimal number (negative: a
signal) and is closed.
"""

import atexit
import contextlib
import errno
import gc
import json
import logging
import multiprocessing.util
import os
import select
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fedpool.sites.descendants import adopt_orphans, end_children, kill, kill_group, living_descendants, own_children
from fedpool.sites.huge_pages import collapse
from fedpool.sites.script import preload, run_script

MAX_REQUEST_BYTES = 1 << 20

_CUDA_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"

_MANY_FORKS = 32
"""Number of forks that are worth rearranging memory once to make further forks cheaper."""

_AT_EXIT: tuple[Callable[[], object], ...] = (
    logging.shutdown,
    multiprocessing.util._exit_function,  # type: ignore[attr-defined]
    weakref.finalize._exitfunc,  # type: ignore[attr-defined]
)
"""Exit functions of the standard library, the last one first; a script may have given them work."""


def serve(control: socket.socket) -> None:
    """Answer requests until the control socket closes."""
    children: dict[int, int] = {}  # pid of a running script -> its status pipe
    helpers: set[int] = set()  # processes that libraries started on import, for all scripts
    num_forks = 0
    adopt_orphans()
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host handles Ctrl-C in the terminal
    sources: list[Any] = [control, wake_read]
    try:
        while True:
            ready, _, _ = select.select(sources, [], [])
            if wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 4096)
                _reap(children, helpers)
            if control in ready:
                data, fds, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 2)
                while data and not data.endswith(b"\n"):
                    more = control.recv(MAX_REQUEST_BYTES)
                    data = data + more if more else b""
                if not data:
                    return
                if fds:
                    num_forks += 1
                    if num_forks == _MANY_FORKS:
                        collapse()
                control.sendall(
                    json.dumps(
                        _answer(json.loads(data), fds, children, helpers, (control.fileno(), wake_read, wake_write))
                    ).encode()
                    + b"\n"
                )
    finally:
        for pid in children:
            kill_group(pid)
        _report(children, end_children())


def _answer(
    request: dict[str, Any], fds: list[int], children: dict[int, int], helpers: set[int], own_fds: tuple[int, ...]
) -> dict[str, Any]:
    if "preload" in request:
        with _asking_nvml():
            failed = preload(request["preload"])
        _settle()
        helpers.update(set(own_children()) - children.keys())
        return {"failed": failed}
    if "kill" in request:
        return {"killed": request["kill"] in children and _kill_script(request["kill"])}
    if len(fds) < 2:  # they were sent, but no file handle was free
        for fd in fds:
            os.close(fd)
        return {"errno": errno.EMFILE}
    output, status = fds
    try:
        pid = os.fork()
    except OSError as error:
        for fd in fds:
            os.close(fd)
        return {"errno": error.errno}
    if pid == 0:
        signal.set_wakeup_fd(-1)
        for fd in (*own_fds, status, *children.values()):
            os.close(fd)
        _run_script(output, **request["fork"])
    os.close(output)
    children[pid] = status
    return {"pid": pid}


@contextlib.contextmanager
def _asking_nvml() -> Iterator[None]:
    """Keep torch from initialising CUDA on import: forked scripts could not use it then."""
    if _CUDA_CHECK in os.environ:
        yield
        return
    os.environ[_CUDA_CHECK] = "1"
    try:
        yield
    finally:
        del os.environ[_CUDA_CHECK]


def _settle() -> None:
    """Make imported objects cheap to share with thousands of children, which copy on write."""
    # A script runs only the exit functions that it registers itself. Those of the imported
    # libraries belong to this process: all scripts share its temporary folders, and torch takes its
    # operators apart, which writes to 30 MB.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    atexit._clear()
    for function in _AT_EXIT:
        atexit.register(function)
    gc.collect()
    gc.freeze()  # a child's garbage collector would write to every page of these objects


def _reap(children: dict[int, int], helpers: set[int]) -> None:
    """Collect ended processes, and kill what ended scripts have left behind."""
    ended: list[tuple[int, int]] = []
    with contextlib.suppress(ChildProcessError):
        while (waited := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(waited)
    scripts = [(pid, wait_status) for pid, wait_status in ended if pid in children]
    for pid, _ in scripts:
        kill_group(pid)
    helpers.difference_update(pid for pid, _ in ended)
    for pid in own_children():
        if pid not in children and pid not in helpers:
            kill(pid)  # what it leaves behind is found when it is collected
    _report(children, scripts)


def _report(children: dict[int, int], ended: Iterable[tuple[int, int]]) -> None:
    """Report how scripts have ended."""
    for pid, wait_status in ended:
        status = children.pop(pid, None)
        if status is None:
            continue
        with contextlib.suppress(BrokenPipeError):  # the reader is gone
            os.write(status, str(os.waitstatus_to_exitcode(wait_status)).encode())
        os.close(status)


def _kill_script(pid: int) -> bool:
    # Without adoption of orphans, this is the last moment to find processes that left the session.
    if sys.platform != "linux":
        for descendant in living_descendants(pid):
            kill(descendant)
    return kill_group(pid)


def _run_script(
    output: int, *, script: str, arguments: list[str], environment: dict[str, str], folder: str, threads: int, seed: int
) -> NoReturn:
    """Become the script: own process group and output, `sys.argv` and `sys.path`."""
    os.setsid()
    adopt_orphans()
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(null)
    os.close(output)
    code = 1
    try:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.update(environment)
        os.chdir(folder)
        code = run_script(script, arguments, threads=threads, seed=seed)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads, as the interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Not sys.exit: tearing down the preloaded modules would write to, and so copy, pages that
        # all scripts share.
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))  # scripts may import modules from there, but this process did not
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # tearing down thousands of modules would take half a second
