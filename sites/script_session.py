"""The session of a client script: a running process, and the exchange of messages with it.

`perform` does one assignment: it starts the script if none is running, hands over the assignment,
logs the script's output and scalars, and returns its update. All of this is one blocking wait on
four sources (a new connection, a message, output, the script's end), so call it on a thread.
"""

import errno
import os
import secrets
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any

from fedpool.client.hosts import Assignment, Welcome
from fedpool.client.link import ADDRESS_VARIABLE, KEY_VARIABLE, LINK_PROTOCOL, Link
from fedpool.errors import SiteError
from fedpool.sites.handles import explain
from fedpool.sites.launcher import Launcher, Script
from fedpool.sites.output import MAX_LINE_BYTES, LogLine, Output
from fedpool.sites.scalars import ScalarLog
from fedpool.sites.script_messages import next_message
from fedpool.sites.session import END_GRACE_S, Reply, Work
from fedpool.storable import storable


class ScriptSession:
    """The client script of one job at one site. Not thread-safe, except for `kill`.

    Args:
        work: the script to run, and its parameters.
        launcher: starts the script.
        folder: the session's own folder for the socket; see `fedpool.sites.sockets`.
        workdir: the script's working directory.
    """

    def __init__(self, work: Work, launcher: Launcher, *, folder: Path, workdir: Path) -> None:
        self._work = work
        self._launcher = launcher
        self._folder = folder
        self._workdir = workdir
        self._script: Script | None = None
        self._listener: socket.socket | None = None
        self._link: Link | None = None
        self._key = b""
        self._asked = False  # the script waits for an assignment in is_running()
        self._handed = False  # the script has the current assignment
        self._exit_code: int | None = None
        self._output = self._new_output()
        self._killed = threading.Event()

    def perform(self, assignment: Assignment, *, deadline: float | None, log: LogLine) -> Reply:
        """See `Session.perform`."""
        self._output.begin(log)
        self._handed = False
        warm = self._script is not None
        try:
            if not warm:
                self._start_or_say_why(assignment)
            if self._killed.is_set():  # kill() may have come just before the script started
                raise _Ended("was killed before it began")
            return self._converse(assignment, deadline, log)
        except _Ended as ended:
            finished = warm and not self._handed and self._exit_code == 0
            cause = str(ended) + self._output.traceback()
            self._clear()
            if finished:  # a script without a loop ends after one round: start it again for each
                return self.perform(assignment, deadline=deadline, log=log)
            raise SiteError(self._work.site, assignment.round, cause) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._clear()
                raise SiteError(self._work.site, assignment.round, f"was killed: {explain(error)}") from error
            # The link broke during a put: the script is ending, and its exit code says more than
            # the broken pipe.
            cause = f"{self._wait_for_end() or error}{self._output.traceback()}"
            self._clear()
            raise SiteError(self._work.site, assignment.round, cause) from None

    def _converse(self, assignment: Assignment, deadline: float | None, log: LogLine) -> Reply:
        """Hand over the assignment when the script asks, and handle messages until the update."""
        logged = ScalarLog()
        while True:
            if self._asked and not self._handed and self._link:
                self._link.put("assignment", assignment=asdict(assignment))
                self._asked, self._handed = False, True
            message = self._step(deadline)
            if message is None:
                continue
            if message["kind"] in ("log", "logs"):
                # Scalars that came together make one log entry, because each entry costs as much as
                # a short step.
                if lines := [storable(line, MAX_LINE_BYTES) for line in logged.take(message)]:
                    log("\n".join(lines))
            elif message["kind"] == "update" and self._handed and message["round"] == assignment.round:
                self._output.finish()
                for line in logged.left_out():
                    log(line)
                return Reply(message, logged.last, logged.scalars)

    @property
    def killed(self) -> bool:
        """See `Session.killed`."""
        return self._killed.is_set()

    def end(self, grace_s: float = END_GRACE_S) -> str | None:
        """See `Session.end`."""
        if self._script is None:
            return None
        self._output.forget()  # the output of earlier rounds does not explain the end
        deadline = time.monotonic() + grace_s
        told = False
        try:
            while True:
                if self._asked and not told and self._link:
                    self._link.put("end")
                    told = True
                self._step(deadline)
        except (_Ended, OSError):
            how = self._wait_for_end(deadline)  # a script that has called shutdown() may still be working
        if self._exit_code == -signal.SIGKILL and time.monotonic() >= deadline:
            how = f"the script was still running {grace_s:g} s after the end of the job, and was killed"
        how += self._output.traceback()
        failed = self._exit_code != 0 and not self.killed
        self._clear()
        return how if failed else None

    def kill(self) -> None:
        """See `Session.kill`."""
        self._killed.set()
        if (script := self._script) is not None:
            self._launcher.kill(script.pid)

    def _start_or_say_why(self, assignment: Assignment) -> None:
        try:
            self._start(assignment)
        except OSError as error:
            self._clear()
            cause = f"the client script could not be started: {explain(error)}"
            raise SiteError(self._work.site, assignment.round, cause) from error

    def _start(self, assignment: Assignment) -> None:
        self._key = secrets.token_bytes(32)
        address = self._folder / "s"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        # A script may run as another user: it alone can enter the folder, and knows the key.
        address.chmod(0o666)
        self._listener.listen(1)
        environment = {**self._work.environment, ADDRESS_VARIABLE: str(address), KEY_VARIABLE: self._key.hex()}
        self._script = self._launcher.start(
            self._work.script,
            arguments=self._work.arguments,
            environment=environment,
            folder=self._workdir,
            seed=assignment.seed or 0,
        )
        os.set_blocking(self._script.output, False)
        self._output.fd = self._script.output

    def _step(self, deadline: float | None) -> dict[str, Any] | None:
        """Wait for one event; returns a message about the assignment, if the event was one."""
        assert self._script is not None
        sources: list[Any] = [self._script.status]
        sources += [self._output.fd] if self._output.fd is not None else []
        sources += [self._link.connection if self._link else self._listener]
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(sources, remaining)
        if not ready:
            self._launcher.kill(self._script.pid)
            self._wait_for_end()
            raise _Ended("sent no update before the round's deadline (round_timeout), and was killed")
        if self._output.fd in ready:
            self._output.read()
        if self._link is None and self._listener in ready:
            try:
                self._accept()
            except EOFError:  # killed during the handshake
                raise _Ended(self._wait_for_end()) from None
            return None
        if self._link is not None and self._link.connection in ready:
            try:
                return self._message()
            except (EOFError, OSError):
                # The script closed the link by ending, or by shutdown(). Either way it can send no
                # more.
                raise _Ended(self._wait_for_end() or "closed its session without sending an update") from None
        if self._script.status in ready:
            raise _Ended(self._wait_for_end() or "ended")
        return None

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        link = Link(Connection(connection.detach()))
        deliver_challenge(link.connection, self._key)
        answer_challenge(link.connection, self._key)
        self._link = link
        self._listener.close()
        (self._folder / "s").unlink()

    def _message(self) -> dict[str, Any] | None:
        assert self._link is not None
        try:
            message = next_message(self._link)
        except ValueError as error:
            raise _Ended(f"sent its host a message that is not valid: {storable(str(error))}") from None
        match message["kind"]:
            case "hello":
                if message["protocol"] != LINK_PROTOCOL:
                    raise _Ended(
                        f"speaks protocol {message['protocol']} of the client API, but this site speaks {LINK_PROTOCOL}"
                    )
                work = self._work
                who = Welcome(work.job_id, work.site, dict(work.config), work.site_index, work.num_sites)
                self._link.put("welcome", **asdict(who))
            case "next":
                self._asked = True
            case "bye":
                raise _Ended("called flare.shutdown() before the job was over")
            case _:
                return message
        return None

    def _wait_for_end(self, deadline: float | None = None) -> str:
        """Read output until the script ends, or kill it at the deadline; returns how it ended."""
        assert self._script is not None
        deadline = time.monotonic() + END_GRACE_S if deadline is None else deadline
        while self._exit_code is None:
            sources: list[int] = [self._script.status]
            sources += [self._output.fd] if self._output.fd is not None else []
            ready = wait(sources, max(0.0, deadline - time.monotonic()))
            if self._output.fd in ready:
                self._output.read()
            if self._script.status in ready:
                answer = os.read(self._script.status, 32)
                self._exit_code = (
                    int(answer) if answer else -signal.SIGKILL
                )  # the launcher died, and its scripts with it
            if not ready:
                self._launcher.kill(self._script.pid)
                deadline = time.monotonic() + END_GRACE_S
        self._output.drain()
        return _describe_exit(self._exit_code)

    def _clear(self) -> None:
        """Make sure that the script is gone, and reset the session."""
        if self._script is not None:
            self._launcher.kill(self._script.pid)
            self._wait_for_end()
            self._output.finish()
            os.close(self._script.output)
            os.close(self._script.status)
        if self._link is not None:
            self._link.close()
        if self._listener is not None:
            self._listener.close()
        with suppress(FileNotFoundError):
            (self._folder / "s").unlink()
        self._script = self._link = self._listener = self._exit_code = None
        self._output = self._new_output()
        self._asked = False

    def _new_output(self) -> Output:
        return Output(self._work.script.parent, self._work.origin)


class _Ended(Exception):
    """The script has ended or was ended; the text says how."""


def _describe_exit(code: int) -> str:
    if code == 0:
        return "the script ended without sending an update"
    if code > 0:
        # Shells and sandboxes report a command's signal in this way.
        by = f" ({_signal_name(code - 128)})" if code > 128 and code - 128 in set(signal.Signals) else ""
        return f"the script ended with exit code {code}{by}"
    return f"the script was killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
