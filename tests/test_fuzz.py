"""Half a minute of fuzzing for everything that reads external data. A reader either reads it or
says what is wrong.
"""

import contextlib
import hashlib
import io
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fedpool.bundle import unpack_bundle
from fedpool.conditions import parse_condition
from fedpool.errors import FedpoolError, IntegrityError, RecipeError
from fedpool.inspection import inspect_tensors
from fedpool.messages import UpdateManifest
from fedpool.paths import JobPaths
from fedpool.sites.site_round import read_delivery
from fedpool.store import Store
from fedpool.tensors import ITEM_SIZES, TensorReader

FUZZ = settings(
    max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

GOOD_TENSORS = save({"w": np.ones((2, 3), np.float32), "n": np.arange(4), "b": np.array([True, False])})
GOOD_MANIFEST = json.dumps(
    UpdateManifest(
        job_id="job", site="a", round=0, task="train", base_sha256="0" * 64, assignment_sha256="0" * 64, seconds=1.0
    ).model_dump(mode="json")
).encode()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
SIZES = st.integers(-2, 1 << 64)


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """The data with some bytes replaced, removed or inserted."""
    edit = st.tuples(st.integers(0, len(data)), st.integers(0, 9), st.binary(max_size=9))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        changed = data
        for at, gone, new in edits:
            changed = changed[:at] + new + changed[at + gone :]
        return changed

    return st.lists(edit, min_size=1, max_size=4).map(apply)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A tensor file whose header is arbitrary JSON."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*ITEM_SIZES, "F8", ""]) | JSON,
            "shape": st.lists(SIZES, max_size=4) | JSON,
            "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
        }
    )
    header = draw(st.dictionaries(st.text(max_size=12), entry | JSON, max_size=4) | JSON)
    head = json.dumps(header).encode()
    length = draw(st.just(len(head)) | st.integers(0, (1 << 64) - 1))
    return struct.pack("<Q", length) + head + draw(st.binary(max_size=64))


@FUZZ
@given(mutated(GOOD_TENSORS) | headers() | st.binary(max_size=200))
@example(GOOD_TENSORS)
def test_a_file_of_tensors_is_read_whole_or_refused(data: bytes) -> None:
    try:
        reader = TensorReader(lambda start, stop: bytearray(data[start:stop]), len(data), where="fuzz")
    except IntegrityError as error:
        assert "fuzz is not a valid safetensors file" in str(error)
        return
    seen = inspect_tensors(reader, 5)
    # Everything in the file is read: nothing hides between or after the tensors.
    assert (seen.digest.sha256, seen.digest.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert sum(entry.num_bytes for entry in reader.spec.values()) + len(reader.head) == len(data)


@FUZZ
@given(mutated(GOOD_MANIFEST) | JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
@example(GOOD_MANIFEST)
def test_a_manifest_is_one_or_is_refused(tmp_path: Path, data: bytes) -> None:
    store, path = Store(tmp_path), JobPaths("job").manifest(0, "a")
    store.remove(path)
    store.write_bytes(path, data)
    try:
        delivery = read_delivery(store, "job", 0, "a", 0)
    except IntegrityError as error:
        assert "its manifest is invalid" in str(error)
        return
    assert delivery.manifest_sha256 == hashlib.sha256(data).hexdigest()
    json.dumps(delivery.manifest.metrics, allow_nan=False)  # records can store the metrics


NAMES = st.sampled_from(
    [
        "client.py",
        "../client.py",
        "/etc/passwd",
        "a/../../b",
        "..",
        "a\\..\\b",
        "C:\\x",
        "a/./b",
        "",
        "a\x00b",
        "sub/",
        "é/ü",
    ]
) | st.text(max_size=20)


@FUZZ
@given(st.dictionaries(NAMES, st.tuples(st.binary(max_size=20), st.integers(0, 0o177777)), max_size=4))
def test_a_bundle_never_writes_outside_its_folder(tmp_path: Path, files: dict[str, tuple[bytes, int]]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, (data, mode) in files.items():
            entry = zipfile.ZipInfo("x")
            entry.filename = name  # not passed to the constructor, which would clean it
            entry.external_attr = mode << 16
            archive.writestr(entry, data)
    data, inside = file.getvalue(), tmp_path / "inside"
    with contextlib.suppress(FedpoolError):
        unpack_bundle(data, inside, sha256=hashlib.sha256(data).hexdigest())
    left = [path for path in tmp_path.rglob("*") if path != inside]
    assert all(inside in path.parents for path in left)
    assert not any(path.is_symlink() for path in left)
    shutil.rmtree(inside, ignore_errors=True)


@FUZZ
@given(st.text(max_size=30) | st.from_regex(r"\w+ ?(>=|<=|>|<|==) ?-?\d+(\.\d+)?", fullmatch=True))
def test_a_condition_is_one_or_is_refused(text: str) -> None:
    try:
        condition: Any = parse_condition(text)
    except RecipeError as error:
        assert repr(text) in str(error)
        return
    assert parse_condition(str(condition)) == condition
