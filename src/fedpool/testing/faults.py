"""A store that fails, stalls, truncates or holds by a plan: fsspec's URL `faulty:///folder`.

The plan is a file in that folder, so it applies to every process that uses the store, and can
change while they run::

    faults = Faults(folder)
    faults.plan(Fault("fail", match=r"round\\.json", operations=("write",)))
    ...                                     # store=faults.url; every write of a round.json fails
    faults.plan()                           # no more faults
"""

import io
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from fedpool.patience import pauses

Operation = Literal["read", "write", "list"]

_PLAN = ".faults.json"
_HELD = ".faults-held"
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Fault:
    """A planned fault.

    Attributes:
        kind: `fail` raises `OSError`; `stall` adds a delay of `seconds`; `truncate` reads or writes
            half of the bytes, and a write then fails; `hold` waits until the plan changes.
        match: regular expression, searched in the object's path inside the store.
        operations: the affected operations.
        probability: share of the calls that are hit, as a function of `seed`, the path, and the
            number of earlier calls for the path.
        seconds: length of a stall.
        when: whether an operation fails or is held before or after it takes effect.
    """

    kind: Literal["fail", "stall", "truncate", "hold"]
    match: str = ""
    operations: tuple[Operation, ...] = ("read", "write", "list")
    probability: float = 1.0
    seed: int = 0
    seconds: float = 1.0
    when: Literal["before", "after"] = "before"


class Faults:
    """The plan of a faulty store.

    Args:
        folder: the store's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self.plan()

    @property
    def url(self) -> str:
        """URL of the store."""
        return f"faulty://{self._folder}"

    def plan(self, *faults: Fault) -> None:
        """Replace the plan: from now on only these faults occur."""
        partial = self._folder / f"{_PLAN}.new"
        partial.write_text(json.dumps([asdict(fault) for fault in faults]))
        (self._folder / _HELD).unlink(missing_ok=True)
        partial.replace(self._folder / _PLAN)

    def wait_until_held(self, timeout_s: float = 60.0) -> None:
        """Block until an operation is held.

        Raises:
            TimeoutError: none was held.
        """
        for pause_s in pauses(timeout_s, _POLL_S):
            if (self._folder / _HELD).exists():
                return
            time.sleep(pause_s)
        raise TimeoutError(f"no operation on {self.url} was held in {timeout_s:g} s")


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """See the module. Writes are atomic, as in object storage, unless they are truncated."""

    protocol = "faulty"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = LocalFileSystem(auto_mkdir=True)
        self._calls: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return os.path.abspath(path.removeprefix("faulty://"))  # noqa: PTH100  # the path need not exist

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        """List a folder."""
        with self._faults("list", path):
            found = self._local.ls(self._strip_protocol(path), detail=True)
        kept = [entry for entry in found if not Path(entry["name"]).name.startswith(".faults")]
        return kept if detail else [entry["name"] for entry in kept]

    def info(self, path: str, **options: Any) -> Any:
        """Size and kind of an object."""
        with self._faults("list", path):
            return self._local.info(self._strip_protocol(path))

    def exists(self, path: str, **options: Any) -> bool:
        """Whether an object exists."""
        with self._faults("list", path):
            return bool(self._local.exists(self._strip_protocol(path)))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes of an object, or a range of them."""
        with self._faults("read", path) as truncated:
            data: bytes = self._local.cat_file(self._strip_protocol(path), start=start, end=end)
        return data[: len(data) // 2] if truncated else data

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """Fetch an object to a local file."""
        Path(lpath).write_bytes(self.cat_file(rpath))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise NotImplementedError(f"mode {mode!r}: write with put_file")
        return io.BytesIO(self.cat_file(path))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        """Write an object from a local file."""
        target = Path(self._strip_protocol(rpath))
        with self._faults("write", rpath) as truncated:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
            shutil.copyfile(lpath, partial)
            if truncated:
                os.truncate(partial, partial.stat().st_size // 2)
            partial.replace(target)
        if truncated:
            raise OSError(f"the write of {rpath} was truncated")

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        with self._faults("write", path):
            Path(self._strip_protocol(path)).unlink()

    @contextmanager
    def _faults(self, operation: Operation, path: str) -> Iterator[bool]:
        """Apply the planned faults to an operation; yields whether its bytes are truncated."""
        path = self._strip_protocol(path)
        folder, plan = _plan_above(Path(path))
        within = path.removeprefix(f"{folder}/")  # so a plan hits the same calls in any folder
        hit = [fault for fault in plan if self._hits(fault, operation, within)]
        for fault in hit:
            if fault.kind == "stall":
                threading.Event().wait(fault.seconds)
            elif fault.when == "before":
                _fail_or_hold(fault, folder, path)
        yield any(fault.kind == "truncate" for fault in hit)
        for fault in hit:
            if fault.when == "after":
                _fail_or_hold(fault, folder, path)

    def _hits(self, fault: Fault, operation: Operation, path: str) -> bool:
        if operation not in fault.operations or not re.search(fault.match, path):
            return False
        with self._lock:
            call = self._calls[operation, path] = self._calls.get((operation, path), 0) + 1
        return random.Random(f"{fault.seed}/{operation}/{path}/{call}").random() < fault.probability


def _plan_above(path: Path) -> tuple[Path, list[Fault]]:
    """The plan of the store that contains a path, and the store's folder."""
    for folder in path.parents:
        try:
            entries = json.loads((folder / _PLAN).read_text())
        except (FileNotFoundError, NotADirectoryError):
            continue
        return folder, [Fault(**{**entry, "operations": tuple(entry["operations"])}) for entry in entries]
    return path, []


def _fail_or_hold(fault: Fault, folder: Path, path: str) -> None:
    if fault.kind == "fail":
        raise OSError(f"{path} is out of reach, as planned")
    if fault.kind == "hold":
        (folder / _HELD).touch()
        pause = threading.Event()
        while fault in _plan_above(folder / "any")[1]:
            pause.wait(_POLL_S)
