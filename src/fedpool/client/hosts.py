"""Where a client script's assignments come from: a session host, or nobody (standalone); `ranks`
has rank 0 of a torchrun.

All three answer to the same four methods, `Host`; `fedpool.client.api` holds everything else.
"""

import atexit
import contextlib
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from fedpool.arrays import ParamsFormat, load_arrays
from fedpool.client.link import LINK_PROTOCOL, Link
from fedpool.errors import ClientError

_HOLD_S = 0.02
"""Scalars that a script logs sooner after the one before than that wait for each other."""
_MAX_HELD = 500
"""And no more of them than that, nor longer than until the next message."""


class Waiting(Exception):
    """No assignment came within the time-out."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """Who the script is: its site is the one of `site_index`, from 0, of the job's `num_sites`."""

    job_id: str
    site: str
    config: dict[str, Any] = field(default_factory=dict)
    site_index: int = 0
    num_sites: int = 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the script is asked to do in one round.

    `model` and `update` are local paths: the global model to read, the file to write. `extras` is
    the path of what the algorithm sends beside the model, `kept` the folder of what stays at the
    site, `exclude` has the patterns of parameters that do; `initial` is the path of the job's
    initial model, where it is not `model` and sites start one of their own from it. `seed` is None
    where nothing is seeded (standalone). `silent` ranks send nothing. `used` are the fields of
    `fedpool.messages.Used`: which of the site's updates counted last.
    """

    round: int
    total_rounds: int
    task: str = "train"
    model: str | None = None
    update: str | None = None
    extras: str | None = None
    kept: str | None = None
    exclude: tuple[str, ...] = ()
    seed: int | None = None
    silent: bool = False
    attempt: int = 0
    used: Mapping[str, Any] | None = None
    initial: str | None = None


class Host(Protocol):
    """The other side of the client API."""

    @property
    def welcome(self) -> Welcome:
        """Who the script is."""
        ...

    def next(self, timeout: float | None) -> Assignment | None:
        """The next assignment, None when the job is over; raises `Waiting` after timeout
        seconds.
        """
        ...

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        """The global model of an assignment."""
        ...

    def put(self, kind: str, **fields: Any) -> None:
        """Send an `update` or a `log` message."""
        ...

    def note(self, text: str) -> None:
        """Write a line to the site's log."""
        ...

    def close(self) -> None:
        """Say goodbye."""
        ...


class SessionHost:
    """The host that started this process and talks over a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._asked = False
        self._held: list[dict[str, Any]] = []
        self._sent_scalars = -math.inf
        self._pid = os.getpid()
        atexit.register(self._at_exit)
        link.put("hello", protocol=LINK_PROTOCOL, pid=os.getpid())
        message = self._get()
        self.welcome = Welcome(**{each.name: message[each.name] for each in fields(Welcome)})

    def next(self, timeout: float | None) -> Assignment | None:
        """See `Host.next`."""
        if not self._asked:  # a receive() that timed out has asked already
            self.put("next")
            self._asked = True
        if timeout is not None and not self._link.connection.poll(timeout):
            raise Waiting
        message = self._get()
        self._asked = False
        if message["kind"] == "end":
            return None
        fields = message["assignment"]
        return Assignment(**{**fields, "exclude": tuple(fields["exclude"])})

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        """See `Host.params`."""
        return load_arrays(assignment.model, params_format) if assignment.model else {}

    def put(self, kind: str, **fields: Any) -> None:
        """See `Host.put`: scalars that come fast are sent together, because each message wakes
        the host.
        """
        if kind == "log":
            fields["time"] = time.time()
        try:
            if kind == "log" and time.monotonic() - self._sent_scalars < _HOLD_S and len(self._held) < _MAX_HELD:
                self._held.append(fields)
                return
            self._send_held()
            self._link.put(kind, **fields)
        except OSError as error:
            raise self._lost() from error
        self._sent_scalars = time.monotonic() if kind == "log" else -math.inf

    def _send_held(self) -> None:
        held, self._held = self._held, []
        if held:
            self._link.put("logs", scalars=held)

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:  # a fork of the script's has a copy of what is held
            with contextlib.suppress(OSError):
                self._send_held()

    def note(self, text: str) -> None:
        """See `Host.note`: what a script prints goes there."""
        self._send_held()
        print(text, flush=True)

    def close(self) -> None:
        """See `Host.close`."""
        try:
            self._send_held()
            self._link.put("bye")
        except OSError:
            return  # the host is gone already: there is nobody to say goodbye to
        self._link.close()

    def _get(self) -> dict[str, Any]:
        try:
            return self._link.get()
        except (EOFError, OSError) as error:
            raise self._lost() from error

    @staticmethod
    def _lost() -> ClientError:
        return ClientError(
            "the session host is gone (the job ended, was cancelled, or its coordinator died): end this script"
        )


class InitialParams(dict[str, Any]):
    """The empty params of a standalone run: loading them leaves a torch module at its own
    initial weights.
    """


class Standalone:
    """No host: one round on the script's own initial weights, so that the same file can be
    debugged alone.
    """

    def __init__(self) -> None:
        self.welcome = Welcome("standalone", "site-1")
        self._done = False
        print("fedpool: no host found, running standalone: one round on this script's own initial weights")

    def next(self, timeout: float | None) -> Assignment | None:
        """See `Host.next`."""
        if self._done:
            return None
        self._done = True
        if (
            "torch" in sys.modules
        ):  # now, and not with the params: `model.load_state_dict(flare.receive().params)` binds first
            let_initial_params_load()
        return Assignment(round=0, total_rounds=1)

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        """See `Host.params`."""
        return InitialParams()

    def put(self, kind: str, **fields: Any) -> None:
        """See `Host.put`: prints what a host would have been sent."""
        if kind == "log":
            print(f"fedpool: log {fields['key']} = {fields['value']}")
            return
        metrics = ", ".join(f"{name} = {value}" for name, value in fields["metrics"].items()) or "no metrics"
        print(f"fedpool: sent {fields['num_params']} parameters, {metrics}, meta {fields['meta']}")

    def note(self, text: str) -> None:
        """See `Host.note`."""
        print(f"fedpool: {text}")

    def close(self) -> None:
        """See `Host.close`: nothing to close."""


def let_initial_params_load() -> None:
    """Let `module.load_state_dict(InitialParams())` be a no-op; a strict load of any other empty
    dict still fails.

    A script's `model.load_state_dict(input_model.params)` must run unchanged when there is no
    global model. torch offers no hook that sees the dict before its keys are compared, so the
    method is wrapped, in standalone runs only.
    """
    import torch
    from torch.nn.modules.module import _IncompatibleKeys

    original = torch.nn.Module.load_state_dict
    if getattr(original, "wrapped_by_fedpool", False):
        return

    def load_state_dict(module: "torch.nn.Module", state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(state_dict, InitialParams) and not state_dict:
            return _IncompatibleKeys([], [])
        return original(module, state_dict, *args, **kwargs)

    load_state_dict.wrapped_by_fedpool = True  # type: ignore[attr-defined]
    torch.nn.Module.load_state_dict = load_state_dict  # type: ignore[assignment, method-assign]
