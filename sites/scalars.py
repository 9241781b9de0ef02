"""The scalars that a client script logs in a round, each with its step and its time.

Neither scripts nor sites are trusted: names are made storable, and scalars beyond a limit are
dropped and counted.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpool.bounds import MAX_NAME, MAX_VALUES
from fedpool.errors import IntegrityError, StoreError
from fedpool.messages import SiteAssignment, Stored
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.storable import storable
from fedpool.store import Store

MAX_SCALARS = 100_000
"""Limit for a site in a round."""
MAX_SHOWN = 50
"""Lines in a site's log per round. Each costs the log and the server as much as a short step."""
MAX_BYTES = 16 << 20
"""Limit on a site's scalars of a round in the store: more than the allowed number can take."""

_FORMAT = 1
_MAX_STEP = (1 << 63) - 1
_END_OF_TIME = 1e11
"""In the year 5138: the largest time that trackers accept."""
_COLUMNS = ("key", "value", "step", "time")


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number that a script has logged.

    Attributes:
        value: may be infinite or NaN.
        step: the script's own count; None if it gave none.
        time: when it was logged, in seconds since 1970 by the site's clock.
    """

    key: str
    value: float
    step: int | None
    time: float


class ScalarLog:
    """Collects the scalars that a script logs in a round."""

    def __init__(self) -> None:
        self.scalars: list[Scalar] = []
        self.dropped = 0
        """Number of scalars beyond the limits."""
        self.last: dict[str, float] = {}
        """name -> last value, for as many names as an update may have."""
        self._keys: dict[str, str] = {}
        self._num = 0

    def take(self, message: Mapping[str, Any]) -> Iterator[str]:
        """Add the scalar of a `log` message, or those of `logs`; yields their lines for the log."""
        for each in (message,) if message["kind"] == "log" else message["scalars"]:
            line = self.add(each["key"], each["value"], each["where"], each.get("time"))
            if line is not None:
                yield line

    def add(self, key: str, value: float, where: Mapping[str, str], when: float | None = None) -> str | None:
        """Add a scalar; returns its line for the log, or None once there were too many.

        Args:
            where: the script's further arguments. `global_step` or `step` is the step, `walltime`
                the time.
            when: the time if `where` has none; None: now.
        """
        self._num += 1
        if key not in self._keys and len(self._keys) >= MAX_VALUES:
            self.dropped += 1
            return self._line(key, value, where)
        known = self._keys.setdefault(key, storable(key)[:MAX_NAME])
        self.last[known] = value
        if len(self.scalars) >= MAX_SCALARS:
            self.dropped += 1
            return self._line(key, value, where)
        step = where.get("global_step", where.get("step"))
        given = _number(where.get("walltime"))
        if given is None or not 0 <= given < _END_OF_TIME:
            given = time.time() if when is None else when
        self.scalars.append(Scalar(known, value, _step(step), given))
        return self._line(key, value, where)

    def left_out(self) -> Iterator[str]:
        """Lines for the end of the round's log: how many scalars were not shown or were dropped."""
        if self._num > MAX_SHOWN:
            yield f"... and {self._num - MAX_SHOWN} more scalars in this round, not shown"
        if self.dropped:
            yield (
                f"{self.dropped} scalars were dropped: trackers get at most {MAX_SCALARS} per site and round, {MAX_VALUES} names"
            )

    def _line(self, key: str, value: float, where: Mapping[str, str]) -> str | None:
        if self._num > MAX_SHOWN:
            return None
        return f"{key} = {value:g}{''.join(f', {name} {said}' for name, said in where.items())}"


def encode(scalars: Sequence[Scalar]) -> bytes:
    """Scalars as JSON, column by column; infinity and NaN are strings, because JSON lacks them."""
    keys = list(dict.fromkeys(scalar.key for scalar in scalars))
    index = {key: position for position, key in enumerate(keys)}
    said = {
        "format": _FORMAT,
        "keys": keys,
        "key": [index[scalar.key] for scalar in scalars],
        "value": [scalar.value if math.isfinite(scalar.value) else str(scalar.value) for scalar in scalars],
        "step": [scalar.step for scalar in scalars],
        "time": [scalar.time for scalar in scalars],
    }
    return (json.dumps(said, allow_nan=False, separators=(",", ":")) + "\n").encode()


def decode(data: bytes) -> list[Scalar]:
    """Decode the output of `encode` from an untrusted site; at most `MAX_SCALARS` scalars.

    Raises:
        IntegrityError: the data is not valid.
    """
    try:
        said = json.loads(data)
        if said["format"] != _FORMAT:
            raise ValueError(f"its format is {said['format']!r}")
        keys = [storable(_text(key))[:MAX_NAME] for key in said["keys"][:MAX_VALUES]]
        key, value, step, when = (said[column][:MAX_SCALARS] for column in _COLUMNS)
        return [
            Scalar(keys[i], float(v), None if s is None else _checked(s), _finite(t))
            for i, v, s, t in zip(key, value, step, when, strict=True)
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise IntegrityError(f"it does not hold scalars: {type(error).__name__}: {str(error)[:200]}") from None


def send_scalars(
    scalars: Sequence[Scalar], store: Store, job_id: str, assignment: SiteAssignment, log: LogLine
) -> Stored | None:
    """Put a script's scalars into the store if the job is tracked. A failure is only logged."""
    paths = JobPaths(job_id)
    try:
        if not scalars or not store.exists(paths.tracked):
            return None
        data = encode(scalars)
        store.write_bytes(paths.scalars(assignment.round, assignment.site, assignment.attempt), data)
        return Stored(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    except (OSError, StoreError) as error:
        log(f"the scalars could not be stored for trackers: {error}")
        return None


def read_scalars(store: Store, path: str, named: Stored) -> list[Scalar]:
    """Read the scalars that a site has put into the store with its manifest.

    Args:
        named: size and hash from the manifest.

    Raises:
        IntegrityError: the object does not match the manifest, is too large, or is not valid.
        StoreError: the store does not answer.
    """
    if named.size > MAX_BYTES:
        raise IntegrityError(
            f"{store.full(path)} has {named.size} bytes, but only {MAX_BYTES} are allowed: its scalars are dropped"
        )
    try:
        if store.size(path) != named.size:
            raise FileNotFoundError
        data = store.read_bytes(path)
    except FileNotFoundError:
        raise IntegrityError(
            f"{store.full(path)} is missing or has another size than its manifest says: its scalars are dropped"
        ) from None
    if hashlib.sha256(data).hexdigest() != named.sha256:
        raise IntegrityError(f"{store.full(path)} does not match the hash in its manifest: its scalars are dropped")
    try:
        return decode(data)
    except IntegrityError as error:
        raise IntegrityError(f"{store.full(path)}: {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:100]} is not a name")
    return value


def _checked(value: Any) -> int:
    if not isinstance(value, int) or abs(value) > _MAX_STEP:
        raise ValueError(f"{str(value)[:100]} is not a step")
    return value


def _finite(value: Any) -> float:
    number = float(value)
    if not 0 <= number < _END_OF_TIME:
        raise ValueError(f"{number} is not a time")
    return number


def _step(text: str | None) -> int | None:
    """A script's step, given as an integer or a number such as "3.0"; None for anything else."""
    if text is None:
        return None
    try:
        step = int(text)
    except ValueError:
        if (number := _number(text)) is None:
            return None
        step = int(number)
    return step if abs(step) <= _MAX_STEP else None


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
