"""The ranks of a torchrun: rank 0 talks to the host, the others get its answers and send nothing.

No call here is collective, so a rank never waits for one that doesn't call. Rank 0 writes each
answer of the host into the store of the process group (c10d's, through which the ranks have found
each other), under the number of its question. Other ranks read the answers in order, and the model
from rank 0's file, which ranks on one machine share.
"""

import atexit
import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpool.arrays import ParamsFormat, load_arrays
from fedpool.client.hosts import (
    Assignment,
    Host,
    InitialParams,
    SessionHost,
    Standalone,
    Waiting,
    Welcome,
    let_initial_params_load,
)
from fedpool.client.link import connect
from fedpool.errors import ClientError
from fedpool.patience import pauses

_WELCOME, _LAST, _LEFT = "fedpool/welcome", "fedpool/last", "fedpool/left"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05
_END_PATIENCE_S = 10.0
"""If the store lives in rank 0's process: how long rank 0 waits at the job's end for ranks that
haven't read the end yet.
"""


class TorchrunHost:
    """One rank of a torchrun, as a host of the client API.

    Needs `torch.distributed.init_process_group()` before the first question. Values in the store
    are JSON, never pickles.

    Args:
        rank: of this process; rank 0 talks to the host.
        host: the host at rank 0, None at other ranks.
    """

    def __init__(self, rank: int, host: Host | None) -> None:
        assert (host is not None) == (rank == 0)
        self._rank = rank
        self._host = host
        self._welcome = host.welcome if host else None
        self._count = 0
        """Questions that rank 0 has asked, or answers that another rank has read."""
        self._answer: dict[str, Any] = {}
        self._store: Any = None

    @property
    def follows(self) -> bool:
        """Whether this rank follows rank 0."""
        return self._host is None

    @property
    def name(self) -> str:
        """The name of this rank in messages."""
        return f"rank {self._rank}"

    @property
    def welcome(self) -> Welcome:
        """Who the script is; ranks above 0 learn it in their first `is_running()`."""
        if self._welcome is None:
            raise ClientError(
                "ranks above 0 learn site, job and config in their first flare.is_running(): call this afterwards"
            )
        return self._welcome

    def introduce(self) -> None:
        """Tell the ranks above 0 who the script is, before the first `next`; they wait for it."""
        if self._host:
            self._write(_WELCOME, asdict(self._host.welcome))
        else:
            self._welcome = Welcome(**self._read(_WELCOME))

    def next(self, timeout: float | None) -> Assignment | None:
        """See `Host.next`. A rank above 0 waits until rank 0 has asked."""
        answer = self._ask(timeout) if self._host else self._follow()
        while self._host is None and "waiting" in answer and timeout is None:
            answer = self._follow()
        if "waiting" in answer:
            raise Waiting
        fields = answer["assignment"]
        if fields is None:
            self._part()
            return None
        if fields["model"] is None and "torch" in sys.modules:  # rank 0 runs standalone
            let_initial_params_load()
        return Assignment(**{**fields, "exclude": tuple(fields["exclude"]), "silent": self.follows})

    def repeat(self) -> None:
        """Publish rank 0's last answer again, because rank 0 has called `is_running()` again;
        ranks above 0 that call it again get the same answer.
        """
        self._publish(self._answer)

    def catch_up(self) -> bool:
        """Skip to rank 0's last question for the next `next`; False if this rank has already
        read its answer.
        """
        store = self._reach()
        last = int(store.get(_LAST)) if store.check([_LAST]) else 0
        if last <= self._count:
            return False
        self._count = last - 1
        return True

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        """See `Host.params`."""
        if self._host:
            return self._host.params(assignment, params_format)
        if assignment.model is None:
            return InitialParams()
        try:
            if _stamp(assignment.model) == self._answer["stamp"]:
                return load_arrays(assignment.model, params_format)
            problem = "is a different file now"
        except FileNotFoundError:
            problem = "does not exist"
        raise ClientError(
            f"rank {self._rank} on {socket.gethostname()} cannot read the model of round {assignment.round}: "
            f"{assignment.model} {problem}. Ranks on several machines need a site folder that all of them share, and every rank "
            "must call flare.receive() before rank 0 sends the round"
        )

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
        if self._host:
            self._host.close()

    def _ask(self, timeout: float | None) -> dict[str, Any]:
        assert self._host is not None
        if self._count == 0:
            self.introduce()
        try:
            assignment = self._host.next(timeout)
        except Waiting:
            return self._publish({"waiting": True})
        stamp = _stamp(assignment.model) if assignment and assignment.model else None
        return self._publish({"assignment": asdict(assignment) if assignment else None, "stamp": stamp})

    def _publish(self, answer: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        self._answer = answer
        self._write(_key(self._count), answer)
        self._write(_LAST, self._count)
        return answer

    def _follow(self) -> dict[str, Any]:
        if self._welcome is None:
            self.introduce()
        answer = self._answer = self._read(_key(self._count + 1))
        self._count += 1
        return answer

    def _part(self) -> None:
        """End the job. If the store lives in rank 0's process, rank 0 waits for the ranks that
        follow.

        Drops the reference to the store, because a process that still held it at interpreter exit
        hung (torch 2.13).
        """
        store, self._store = self._reach(), None
        if self._host is None:
            store.set(f"fedpool/heard/{self._rank}", "")
            return
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has the store
            return
        import torch.distributed as dist

        ranks = range(1, dist.get_world_size())
        follow = [rank for rank in ranks if store.check([f"fedpool/follows/{rank}"])]
        for pause_s in pauses(_END_PATIENCE_S, _LONGEST_PAUSE_S):
            if all(store.check([f"fedpool/heard/{rank}"]) for rank in follow):
                return
            time.sleep(pause_s)

    def _reach(self) -> Any:
        """The store of the process group.

        Raises:
            ClientError: there is no process group.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            if self._store is not None:  # the script has destroyed its groups, but the store still exists
                return self._store
            raise ClientError(
                "under torchrun, call torch.distributed.init_process_group() before the first flare.is_running(): "
                "the other ranks get rank 0's answers through it"
            )
        if self._store is None:
            if self._host:
                atexit.register(self._leave)
            else:
                dist.distributed_c10d._get_default_store().set(f"fedpool/follows/{self._rank}", "")
        self._store = dist.distributed_c10d._get_default_store()
        return self._store

    def _leave(self) -> None:
        """Tell the other ranks that rank 0 ends and asks no more questions."""
        store, self._store = self._store, None
        if store is not None:
            with suppress(RuntimeError):  # the store has already ended, and so have the ranks that waited
                store.set(_LEFT, "")

    def _write(self, key: str, value: Any) -> None:
        self._reach().set(key, json.dumps(value))

    def _read(self, key: str) -> dict[str, Any]:
        """The value that rank 0 writes under a key; waits for it."""
        # Not store.wait(): it would block the store for torch's own threads, such as NCCL's
        # watchdog.
        pause = _FIRST_PAUSE_S
        try:
            while not self._reach().check([key]):
                if self._reach().check([_LEFT]) and not self._reach().check([key]):
                    raise ConnectionError("it ended without asking for another round")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            value: dict[str, Any] = json.loads(self._reach().get(key))
        except ClientError:
            raise
        except (RuntimeError, ConnectionError) as error:
            raise ClientError(
                f"rank {self._rank} is waiting in flare.is_running() or flare.receive() for rank 0, which is gone ({error}): "
                "have every rank leave the loop when rank 0 does, for example by calling flare.is_running() on every rank"
            ) from error
        return value


def find_host(rank: int | None) -> Host:
    """The host of this process, from the environment that a session or torchrun set, else
    standalone.

    Args:
        rank: global rank; None reads torchrun's `RANK`, or the variables of Lightning's launcher.
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
    """This process's global rank, or some number above 0 if the exact rank is unknown."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    # Lightning's launcher sets no global rank, but we only need to know whether it is 0.
    return int(os.environ.get("NODE_RANK", "0")) or int(os.environ.get("LOCAL_RANK", "0"))


def _key(number: int) -> str:
    return f"fedpool/answer/{number}"


def _stamp(path: str) -> list[int]:
    """The size and modification time of a file, to detect another one with the same name."""
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]
