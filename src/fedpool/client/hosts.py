"""Where a client script's assignments come from: a session host, nobody (standalone), or rank 0 of a torchrun.

All three answer to the same four methods, `Host`; `fedpool.client.api` holds everything else.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from fedpool.arrays import ParamsFormat, load_arrays
from fedpool.client.link import PROTOCOL, Link, connect
from fedpool.errors import ClientError

if TYPE_CHECKING:
    import torch


_PATIENCE = timedelta(days=30)
"""How long ranks above 0 wait for rank 0, which waits for the slowest site; a rank that dies is noticed at once."""


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

    `model` and `update` are local paths: the global model to read, the file to write. `extras` is the path of what the
    algorithm sends beside the model, `kept` the folder of what stays at the site, `exclude` has the patterns of parameters
    that do. `seed` is None where nothing is seeded (standalone). `silent` ranks send nothing.
    """

    round: int
    total_rounds: int
    task: str = "train"
    model: str | None = None
    update: str | None = None
    extras: str | None = None
    kept: str | None = None
    transfer: str = "FULL"
    exclude: tuple[str, ...] = ()
    seed: int | None = None
    silent: bool = False


class Host(Protocol):
    """The other side of the client API."""

    @property
    def welcome(self) -> Welcome:
        """Who the script is."""
        ...

    def next(self, timeout: float | None) -> Assignment | None:
        """The next assignment, None when the job is over; raises `Waiting` after timeout seconds."""
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
        link.put("hello", protocol=PROTOCOL, pid=os.getpid())
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
        """See `Host.put`."""
        try:
            self._link.put(kind, **fields)
        except OSError as error:
            raise self._lost() from error

    def note(self, text: str) -> None:
        """See `Host.note`: what a script prints goes there."""
        print(text, flush=True)

    def close(self) -> None:
        """See `Host.close`."""
        try:
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
    """The empty params of a standalone run: loading them leaves a torch module at its own initial weights."""


class Standalone:
    """No host: one round on the script's own initial weights, so that the same file can be debugged alone."""

    def __init__(self) -> None:
        self.welcome = Welcome("standalone", "site-1")
        self._done = False
        print("fedpool: no host around, running standalone: one round on this script's own initial weights")

    def next(self, timeout: float | None) -> Assignment | None:
        """See `Host.next`."""
        if self._done:
            return None
        self._done = True
        if (
            "torch" in sys.modules
        ):  # now, and not with the params: `model.load_state_dict(flare.receive().params)` binds first
            _let_initial_params_load()
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


def _let_initial_params_load() -> None:
    """Let `module.load_state_dict(InitialParams())` be a no-op; a strict load of any other empty dict still fails.

    A script's `model.load_state_dict(input_model.params)` must run unchanged when there is no global model. torch offers
    no hook that sees the dict before its keys are compared, so the method is wrapped, in standalone runs only.
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


class TorchrunHost:
    """One rank of a torchrun: rank 0 talks to the real host, the others get everything by broadcast and send nothing.

    Needs `torch.distributed.init_process_group()` before the first `is_running()`; uses a gloo group of its own, so that
    the script's nccl group is left alone. What crosses is JSON and raw tensors, not pickles.

    Args:
        rank: of this process, 0 talks.
        host: the real host at rank 0, None elsewhere.
    """

    def __init__(self, rank: int, host: Host | None) -> None:
        assert (host is not None) == (rank == 0)
        self._rank = rank
        self._host = host
        self._group: Any = None
        self._welcome = host.welcome if host else None

    @property
    def welcome(self) -> Welcome:
        """Who the script is; ranks above 0 learn it in the first `is_running()`."""
        if self._welcome is None:
            raise ClientError("ranks above 0 learn site, job and config in the first flare.is_running(): ask after it")
        return self._welcome

    def introduce(self) -> None:
        """Tell the ranks above 0 who the script is, before the first `next`; collective."""
        outcome = self._broadcast(asdict(self._host.welcome) if self._host else None)
        self._welcome = Welcome(**outcome)

    def next(self, timeout: float | None) -> Assignment | None:
        """See `Host.next`; collective."""
        outcome: dict[str, Any] | None = None
        if self._host:
            try:
                assignment = self._host.next(timeout)
                outcome = {"assignment": asdict(assignment) if assignment else None}
            except Waiting:
                outcome = {"waiting": True}
            outcome["welcome"] = asdict(self._host.welcome)
        outcome = self._broadcast(outcome)
        self._welcome = Welcome(**outcome["welcome"])
        if outcome.get("waiting"):
            raise Waiting
        fields = outcome["assignment"]
        if fields is None:
            self._leave()
            return None
        if fields["model"] is None and "torch" in sys.modules:  # rank 0 runs standalone
            _let_initial_params_load()
        return Assignment(**{**fields, "exclude": tuple(fields["exclude"]), "silent": self._host is None})

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        """See `Host.params`; collective."""
        import torch
        import torch.distributed as dist

        from fedpool.arrays import as_numpy, describe, torch_dtype

        mine: dict[str, torch.Tensor] = self._host.params(assignment, "torch") if self._host else {}
        spec = {name: describe(name, value) for name, value in mine.items()}
        shared = self._broadcast({name: [entry.dtype, list(entry.shape)] for name, entry in spec.items()})
        if not shared:
            return mine if self._host else InitialParams()
        params: dict[str, torch.Tensor] = {}
        for name, (dtype, shape) in shared.items():
            value = mine[name].contiguous() if self._host else torch.empty(shape, dtype=torch_dtype(dtype))
            dist.broadcast(value.reshape(-1).view(torch.uint8), 0, group=self._group)
            params[name] = value
        if params_format == "torch":
            return params
        return {name: as_numpy(value) for name, value in params.items()}

    def put(self, kind: str, **fields: Any) -> None:
        """See `Host.put`; only rank 0 sends."""
        if self._host:
            self._host.put(kind, **fields)

    def note(self, text: str) -> None:
        """See `Host.note`; only rank 0 writes."""
        if self._host:
            self._host.note(text)

    def close(self) -> None:
        """See `Host.close`."""
        self._leave()
        if self._host:
            self._host.close()

    def _leave(self) -> None:
        """Give the group up. Of processes that kept one on gloo until their end, some were aborted there (torch 2.13)."""
        group, self._group = self._group, None
        if group is None:
            return
        import torch.distributed as dist

        if dist.is_initialized():  # else the script has given up all groups
            dist.destroy_process_group(group)

    def _broadcast(self, value: dict[str, Any] | None) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ClientError(
                "under torchrun, call torch.distributed.init_process_group() before the first flare.is_running(): "
                "the other ranks get the model by broadcast"
            )
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        data = json.dumps(value).encode() if self._host else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self._group)
        buffer = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(buffer, 0, group=self._group)
        received: dict[str, Any] = json.loads(bytes(buffer.tolist()))
        return received


def find_host(rank: int | None) -> Host:
    """The host of this process: by the environment that a session or torchrun has set, else standalone.

    Args:
        rank: global rank; None reads torchrun's `RANK`, or what Lightning's launcher sets.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if rank is None:
        rank = _rank_of_environment()
    if rank > 0:
        return TorchrunHost(rank, None)
    link = connect()
    host: Host = SessionHost(link) if link else Standalone()
    return TorchrunHost(0, host) if world_size > 1 else host


def _rank_of_environment() -> int:
    """This process's global rank, or just some number above 0 where only that much is known."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    # Lightning's own launcher gives no global rank; whether it is 0 can be told, and no more is needed.
    return int(os.environ.get("NODE_RANK", "0")) or int(os.environ.get("LOCAL_RANK", "0"))
