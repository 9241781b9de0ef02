"""The zygote: a process that has imported what client scripts need, and forks a script in
milliseconds.

`multiprocessing`'s own fork server runs the caller's `__main__` again in every child, which would
run a user's `job.py` again; this one runs nothing but the script it is asked to. It is
single-threaded, so that forking is safe, and it is the parent of every script it forks: when its
control socket closes (the host ended, or was killed), it kills them all and ends. What a script has
started is killed when the script ends, also what has left its session. While a script lives, it
adopts its own orphans; when it ends, the zygote does. So a child of the zygote that is no script,
and was not started by an import, was left behind by a script that has ended.

Run as `python -m fedpool.sites.zygote_process FD`, where FD is a socket inherited from the host.
Each request is one JSON line. `{"preload": [...]}` answers `{"failed": {name: why}}`;
`{"fork": {...}}` comes with two file descriptors (the script's output, the status pipe) and answers
`{"pid": n}`, or `{"errno": n}` when it could not; `{"kill": pid}` answers `{"killed": bool}`. The
status pipe gets the script's exit code as a decimal number (negative: a signal) when it ends, and
is closed then.
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
from typing import Any, NoReturn

from fedpool.sites.descendants import adopt_orphans, end_children, kill, kill_group, living_descendants, own_children
from fedpool.sites.huge_pages import collapse
from fedpool.sites.script import preload, run_script

MAX_REQUEST_BYTES = 1 << 20

_CUDA_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"

_MANY_FORKS = 32
"""From here on each fork is made cheaper, once and for all, which costs as much as that many
forks and more.
"""

_AT_EXIT: tuple[Callable[[], object], ...] = (
    logging.shutdown,
    multiprocessing.util._exit_function,  # type: ignore[attr-defined]
    weakref.finalize._exitfunc,  # type: ignore[attr-defined]
)
"""What the standard library does at the end of every interpreter, the last first; a script may
have given it something to do.
"""


def serve(control: socket.socket) -> None:
    """Answer requests until the control socket closes."""
    children: dict[int, int] = {}  # pid of a running script -> its status pipe
    helpers: set[int] = set()  # what libraries have started as they were imported, for all scripts
    num_forks = 0
    adopt_orphans()
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the host's to handle
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
    if len(fds) < 2:  # they came, but no handle was free for them
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
    """Libraries ask for GPUs as they are imported. By default torch then initialises CUDA, which
    a fork cannot use any more.
    """
    if _CUDA_CHECK in os.environ:
        yield
        return
    os.environ[_CUDA_CHECK] = "1"
    try:
        yield
    finally:
        del os.environ[_CUDA_CHECK]


def _settle() -> None:
    """Make what was imported cheap to share with thousands of children, which copy each page of
    memory that they write to.
    """
    # At its end a script runs what it has registered itself, and not what the imported libraries
    # have: that is about this process, whose temporary folders all scripts share, and torch takes
    # its operators apart there, which writes to 30 MB.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    atexit._clear()
    for function in _AT_EXIT:
        atexit.register(function)
    gc.collect()
    gc.freeze()  # the collector in a child would write to every page of these objects


def _reap(children: dict[int, int], helpers: set[int]) -> None:
    """Collect what has ended, and kill what ended scripts have left behind."""
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
            kill(pid)  # when it is collected, what it leaves behind is found in its turn
    _report(children, scripts)


def _report(children: dict[int, int], ended: Iterable[tuple[int, int]]) -> None:
    """Tell how scripts have ended."""
    for pid, wait_status in ended:
        status = children.pop(pid, None)
        if status is None:
            continue
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            os.write(status, str(os.waitstatus_to_exitcode(wait_status)).encode())
        os.close(status)


def _kill_script(pid: int) -> bool:
    # Where nobody adopts orphans, this is the last moment to find what has left the session.
    if sys.platform != "linux":
        for descendant in living_descendants(pid):
            kill(descendant)
    return kill_group(pid)


def _run_script(
    output: int, *, script: str, arguments: list[str], environment: dict[str, str], folder: str, threads: int, seed: int
) -> NoReturn:
    """Become the script: own process group, own output, `sys.argv` and `sys.path` as `python
    script.py` would set them.
    """
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
        threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads, as an interpreter's end does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Not sys.exit: tearing down the preloaded modules would touch, and so copy, pages shared
        # with every other script.
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # nothing here needs tearing down, and modules by the thousand take half a second
