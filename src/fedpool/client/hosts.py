"""The source of a client script's assignments: a session host, or none (standalone).

Both implement the protocol `Host`, and so does rank 0 of a torchrun, in `ranks`. The rest of the
client API is in `fedpool.client.api`.
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
"""A scalar that is logged sooner than this after the last sent one is held back."""
_MAX_HELD = 500
"""The most scalars that are held back. The next message sends them."""


class Waiting(Exception):
    """No assignment arrived within the timeout."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """Who the script is. `site_index` counts the job's `num_sites` sites from 0."""

    job_id: str
    site: str
    config: dict[str, Any] = field(default_factory=dict)
    site_index: int = 0
    num_sites: int = 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """The script's work in one round.

    Paths are local.

    Attributes:
        model: path of the global model.
        update: path of the file to write.
        extras: path of the tensors that the algorithm sends along with the model.
        kept: folder of the tensors that stay at the site.
        exclude: patterns of the parameters that stay at the site.
        seed: None if nothing is seeded (standalone).
        silent: whether this rank sends nothing.
        used: the fields of `fedpool.messages.Used`: which of the site's updates counted last.
        initial: path of the job's initial model, if sites start a model of their own from it and it
            isn't `model`.
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
        """The next assignment; None when the job is over. Raises `Waiting` after the timeout, in
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
        if not self._asked:  # a receive() that timed out has already asked
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
        """See `Host.put`. Scalars in quick succession are sent together: each message wakes the
        host.
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
        if os.getpid() == self._pid:  # a fork of the script has a copy of the held scalars
            with contextlib.suppress(OSError):
                self._send_held()

    def note(self, text: str) -> None:
        """See `Host.note`. The script's output goes to the site's log."""
        self._send_held()
        print(text, flush=True)

    def close(self) -> None:
        """See `Host.close`."""
        try:
            self._send_held()
            self._link.put("bye")
        except OSError:
            return  # the host is already gone
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
    """The empty params of a standalone run: loading them keeps a torch module's initial weights."""


class Standalone:
    """No host: one round on the script's own initial weights, so that you can debug the script
    alone.
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
        # Not in params(): `model.load_state_dict(flare.receive().params)` binds the method first.
        if "torch" in sys.modules:
            let_initial_params_load()
        return Assignment(round=0, total_rounds=1)

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        """See `Host.params`."""
        return InitialParams()

    def put(self, kind: str, **fields: Any) -> None:
        """See `Host.put`: prints the message."""
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
    """Let `module.load_state_dict(InitialParams())` do nothing; other empty dicts still fail if
    strict.

    A script's `model.load_state_dict(input_model.params)` must run unchanged without a global
    model. torch has no hook that sees the dict before its keys are compared, so the method is
    wrapped, in standalone runs only.
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
