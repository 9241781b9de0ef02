"""The scalars that a client script logs in a round: all of them, each with its step and its time.

A script, and a site, may log what it likes: names are made storable, and what exceeds a bound is
dropped and counted.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpool.errors import IntegrityError, StoreError
from fedpool.messages import SiteAssignment, Stored
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.storable import storable
from fedpool.store import Store

MAX_SCALARS = 100_000
"""Of a site in a round."""
MAX_SHOWN = 50
"""Of a site in a round, in its log: each line costs the log's file and the Prefect server as
much as a short step takes.
"""
MAX_KEYS = 1_000
MAX_KEY = 250
"""Characters of a name, as many as MLflow takes."""
MAX_BYTES = 16 << 20
"""Of a site's scalars of a round in the store: above what as many as are allowed can take."""

_FORMAT = 1
_MAX_STEP = (1 << 63) - 1
_END_OF_TIME = 1e11
"""In the year 5138: what a tracker can still take for a time."""
_COLUMNS = ("key", "value", "step", "time")


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number that a script has logged.

    Attributes:
        value: it need not be finite.
        step: the script's own count; None where it gave none.
        time: when it was logged, in seconds since 1970, by the site's clock.
    """

    key: str
    value: float
    step: int | None
    time: float


class ScalarLog:
    """What a script logs in a round, as it comes."""

    def __init__(self) -> None:
        self.scalars: list[Scalar] = []
        self.dropped = 0
        """How many there were beyond what is allowed."""
        self.last: dict[str, float] = {}
        """The last value of each, without a bound."""
        self._keys: dict[str, str] = {}
        self._num = 0

    def take(self, message: Mapping[str, Any]) -> Iterator[str]:
        """Note the scalar of a message `log`, or those of `logs`; gives their lines for the log."""
        for each in (message,) if message["kind"] == "log" else message["scalars"]:
            line = self.add(each["key"], each["value"], each["where"], each.get("time"))
            if line is not None:
                yield line

    def add(self, key: str, value: float, where: Mapping[str, str], when: float | None = None) -> str | None:
        """Note a scalar; returns its line for the log, unless there have been many.

        Args:
            where: what the script said besides. `global_step` or `step` is its step, `walltime` its
                time.
            when: its time otherwise; None for now.
        """
        self._num += 1
        self.last[key] = value
        if len(self.scalars) >= MAX_SCALARS or (key not in self._keys and len(self._keys) >= MAX_KEYS):
            self.dropped += 1
            return self._line(key, value, where)
        known = self._keys.setdefault(key, storable(key)[:MAX_KEY])
        step = where.get("global_step", where.get("step"))
        given = _number(where.get("walltime"))
        if given is None or not 0 <= given < _END_OF_TIME:
            given = time.time() if when is None else when
        self.scalars.append(Scalar(known, value, _step(step), given))
        return self._line(key, value, where)

    def left_out(self) -> Iterator[str]:
        """Lines for the log, at the end of the round: what was not shown, and what was dropped."""
        if self._num > MAX_SHOWN:
            yield f"... and {self._num - MAX_SHOWN} more scalars in this round, which are not shown here"
        if self.dropped:
            yield (
                f"{self.dropped} scalars are dropped: trackers get {MAX_SCALARS} of a site in a round, of {MAX_KEYS} names"
            )

    def _line(self, key: str, value: float, where: Mapping[str, str]) -> str | None:
        if self._num > MAX_SHOWN:
            return None
        return f"{key} = {value:g}{''.join(f', {name} {said}' for name, said in where.items())}"


def encode(scalars: Sequence[Scalar]) -> bytes:
    """Scalars as JSON, column by column; infinity and NaN are strings, which JSON has no numbers
    for.
    """
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
    """Scalars out of what `encode` has made, at a site that is not trusted; no more than
    `MAX_SCALARS`.

    Raises:
        IntegrityError: it is something else.
    """
    try:
        said = json.loads(data)
        if said["format"] != _FORMAT:
            raise ValueError(f"its format is {said['format']!r}")
        keys = [storable(_text(key))[:MAX_KEY] for key in said["keys"][:MAX_KEYS]]
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
    """Put what a script has logged into the store, where the job asks for it; nothing fails for
    its sake.
    """
    paths = JobPaths(job_id)
    try:
        if not scalars or not store.exists(paths.tracked):
            return None
        data = encode(scalars)
        store.write_bytes(paths.scalars(assignment.round, assignment.site, assignment.attempt), data)
        return Stored(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    except (OSError, StoreError) as error:
        log(f"trackers do not get what it has logged: {error}")
        return None


def read_scalars(store: Store, path: str, named: Stored) -> list[Scalar]:
    """What a site has put into the store beside its manifest.

    Args:
        named: what the manifest says of it.

    Raises:
        IntegrityError: it is not what the manifest says, is too much, or is something else.
        StoreError: the store does not answer.
    """
    if named.size > MAX_BYTES:
        raise IntegrityError(
            f"{store.full(path)} has {named.size} bytes, {MAX_BYTES} are allowed: its scalars are dropped"
        )
    try:
        if store.size(path) != named.size:
            raise FileNotFoundError
        data = store.read_bytes(path)
    except FileNotFoundError:
        raise IntegrityError(f"{store.full(path)} is not there as its manifest says: its scalars are dropped") from None
    if hashlib.sha256(data).hexdigest() != named.sha256:
        raise IntegrityError(f"{store.full(path)} is not what its manifest says: its scalars are dropped")
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
    """A script's step: an integer, or what is close to one, such as "3.0"; None for anything
    else.
    """
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
