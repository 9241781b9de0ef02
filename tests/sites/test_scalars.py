"""A round's scalars: as they are logged, in the store, and from an untrusted site."""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from fedpool.bounds import MAX_NAME, MAX_VALUES
from fedpool.errors import IntegrityError
from fedpool.messages import Stored
from fedpool.sites import scalars
from fedpool.sites.scalars import MAX_SCALARS, MAX_SHOWN, Scalar, ScalarLog, decode, encode, read_scalars
from fedpool.store import Store


def test_every_scalar_is_kept_with_its_step_and_time_and_the_last_value_by_name() -> None:
    log, before = ScalarLog(), time.time()
    log.add("loss", 2.0, {"global_step": "7"})
    log.add("loss", 1.0, {"step": "8.0"})
    log.add("lr", 0.1, {})
    log.add("lr", 0.2, {"global_step": "soon", "walltime": "12.5"})
    assert [(s.key, s.value, s.step) for s in log.scalars] == [
        ("loss", 2.0, 7),
        ("loss", 1.0, 8),
        ("lr", 0.1, None),
        ("lr", 0.2, None),
    ]
    assert all(before <= s.time <= time.time() for s in log.scalars[:3]) and log.scalars[3].time == 12.5
    assert log.last == {"loss": 1.0, "lr": 0.2}


def test_names_are_made_storable_and_steps_that_no_tracker_holds_are_left_out() -> None:
    log = ScalarLog()
    log.add("a\x00\ud800" + "b" * 1000, 1.0, {"step": str(1 << 80), "walltime": "-1"})
    (scalar,) = log.scalars
    assert abs(scalar.time - time.time()) < 60
    assert scalar.key.startswith("a\\x00\\ud800b") and len(scalar.key) == MAX_NAME and scalar.step is None


def test_what_exceeds_a_bound_is_dropped_and_told_and_the_log_shows_the_first_ones() -> None:
    log = ScalarLog()
    shown = [log.add("loss", float(step), {"step": str(step)}) for step in range(MAX_SCALARS + 5)]
    assert len(log.scalars) == MAX_SCALARS and log.dropped == 5 and log.last == {"loss": MAX_SCALARS + 4}
    assert shown[0] == "loss = 0, step 0" and shown[MAX_SHOWN - 1] is not None
    assert not any(shown[MAX_SHOWN:])
    assert list(log.left_out()) == [
        f"... and {MAX_SCALARS + 5 - MAX_SHOWN} more scalars in this round, not shown",
        "5 scalars were dropped: trackers get at most 100000 per site and round, 1000 names",
    ]


def test_so_are_more_names_than_a_tracker_can_show() -> None:
    log = ScalarLog()
    for number in range(1200):
        log.add(f"key-{number}", 0.0, {})
    assert len(log.scalars) == 1000 and log.dropped == 200


def test_in_the_store_they_are_the_same_also_when_they_are_not_finite() -> None:
    sent = [Scalar("a", 0.1, 1, 2.5), Scalar("b", math.inf, None, 3.0), Scalar("a", -math.inf, -4, 3.5)]
    assert decode(encode(sent)) == sent
    (back,) = decode(encode([Scalar("a", math.nan, 0, 0.0)]))
    assert math.isnan(back.value)


def test_as_many_as_are_allowed_take_less_than_the_coordinator_reads() -> None:
    names = [f"{number:04d}".ljust(MAX_NAME, "\u20ac") for number in range(MAX_VALUES)]
    worst = [
        Scalar(names[n % len(names)], -1.2345678901234567e-300, -(1 << 63) + 1, 1e10 / 3) for n in range(MAX_SCALARS)
    ]
    assert len(encode(worst)) < scalars.MAX_BYTES


GOOD: dict[str, Any] = {"format": 1, "keys": ["a"], "key": [0], "value": [1.0], "step": [None], "time": [1.0]}
WRONG: tuple[dict[str, Any], ...] = (
    {"format": 2},
    {"keys": [1]},
    {"keys": {}},
    {"key": [1]},
    {"key": [0, 0]},
    {"key": ["a"]},
    {"value": ["much"]},
    {"value": [None]},
    {"step": ["1"]},
    {"step": [1 << 64]},
    {"step": [1.5]},
    {"time": [-1]},
    {"time": ["nan"]},
    {"time": 5},
)


@pytest.mark.parametrize(
    "said",
    [
        "no JSON",
        "[]",
        '"text"',
        "[" * 100_000,
        *(json.dumps(GOOD | wrong) for wrong in WRONG),
    ],
)
def test_what_a_site_sends_instead_is_refused(said: str) -> None:
    with pytest.raises(IntegrityError, match="it does not hold scalars"):
        decode(said.encode())


def test_a_site_that_sends_more_than_is_allowed_is_read_up_to_the_bound() -> None:
    many = MAX_SCALARS + 10
    said = GOOD | {"key": [0] * many, "value": [1.0] * many, "step": [None] * many, "time": [1.0] * many}
    assert len(decode(json.dumps(said).encode())) == MAX_SCALARS


def test_they_are_read_as_the_manifest_names_them_and_refused_otherwise(tmp_path: Path) -> None:
    store, data = Store(tmp_path), encode([Scalar("a", 0.5, 1, 2.0)])
    named = Stored(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    with pytest.raises(IntegrityError, match="is missing or has another size than its manifest says"):
        read_scalars(store, "x.json", named)
    store.write_bytes("x.json", data)
    assert read_scalars(store, "x.json", named) == [Scalar("a", 0.5, 1, 2.0)]
    with pytest.raises(IntegrityError, match="is missing or has another size"):
        read_scalars(store, "x.json", Stored(sha256=named.sha256, size=1))
    with pytest.raises(IntegrityError, match="does not match the hash in its manifest"):
        read_scalars(store, "x.json", Stored(sha256="0" * 64, size=len(data)))
    with pytest.raises(IntegrityError, match="has 1000000000 bytes, but only 16777216 are allowed"):
        read_scalars(store, "x.json", Stored(sha256=named.sha256, size=10**9))
