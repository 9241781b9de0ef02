"""The safetensors format: written as a stream, read in blocks, and nothing but `IntegrityError` for
invalid bytes.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as official_load
from safetensors.numpy import save as official_save

from fedpool.errors import IntegrityError
from fedpool.tensor_stream import write_and_hash
from fedpool.tensors import (
    ITEM_SIZES,
    MAX_HEADER_BYTES,
    Digest,
    TensorReader,
    TensorSpec,
    block_ranges,
    blocks_of,
    file_order,
)

specs = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(TensorSpec, st.sampled_from(sorted(ITEM_SIZES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


def reader_of(data: bytes, read: bytes | None = None) -> TensorReader:
    """A reader of `data`; `read`, if given, is what the file really contains when it is read."""
    source = data if read is None else read
    return TensorReader(lambda start, stop: bytearray(source[start:stop]), len(data), where="the file")


def written(contents: Mapping[str, tuple[TensorSpec, bytes]]) -> bytes:
    file = io.BytesIO()
    spec = {name: entry for name, (entry, _) in contents.items()}
    digest = write_and_hash(file, spec, (contents[name][1] for name in file_order(spec)))
    assert digest.sha256 == hashlib.sha256(file.getvalue()).hexdigest()
    assert digest.size == len(file.getvalue())
    return file.getvalue()


def filled(spec: Mapping[str, TensorSpec], seed: int) -> dict[str, tuple[TensorSpec, bytes]]:
    generator = np.random.default_rng(seed)
    return {name: (entry, generator.bytes(entry.num_bytes)) for name, entry in spec.items()}


def file_with(header: Any, body: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 2**32))
def test_what_is_written_is_read_back_whole(spec: dict[str, TensorSpec], seed: int) -> None:
    contents = filled(spec, seed)
    reader = reader_of(written(contents))
    assert reader.spec == spec
    assert {name: bytes(reader.read_block(name, 0, entry.num_elements)) for name, entry in reader.spec.items()} == {
        name: data for name, (_, data) in contents.items()
    }


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(0, 2**32), st.randoms())
def test_the_same_tensors_give_the_same_bytes_in_whatever_order_they_come(
    spec: dict[str, TensorSpec], seed: int, random: Any
) -> None:
    contents = filled(spec, seed)
    names = list(contents)
    random.shuffle(names)
    assert written({name: contents[name] for name in names}) == written(contents)


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(0, 2**32))
def test_every_tensor_lies_at_a_multiple_of_its_item_size(spec: dict[str, TensorSpec], seed: int) -> None:
    data = written(filled(spec, seed))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert all(entry["data_offsets"][0] % ITEM_SIZES[entry["dtype"]] == 0 for entry in header.values())


def test_the_safetensors_library_reads_what_is_written() -> None:
    values: dict[str, np.ndarray[Any, Any]] = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "steps": np.array(7, dtype=np.int64),
        "mask": np.array([True, False]),
        "none": np.empty((0, 4), dtype=np.float16),
    }
    codes = {"float32": "F32", "int64": "I64", "bool": "BOOL", "float16": "F16"}
    data = written({name: (TensorSpec(codes[v.dtype.name], v.shape), v.tobytes()) for name, v in values.items()})
    loaded = official_load(data)
    assert set(loaded) == set(values)
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert np.array_equal(loaded[name], value)


def test_what_the_safetensors_library_writes_is_read() -> None:
    data = official_save({"w": np.arange(4, dtype=np.float64)}, metadata={"format": "pt"})
    reader = reader_of(data)
    assert reader.spec == {"w": TensorSpec("F64", (4,))}
    assert bytes(reader.read_block("w", 1, 3)) == np.array([1.0, 2.0]).tobytes()


def test_a_block_is_a_run_of_elements_of_the_flattened_tensor() -> None:
    values = np.arange(12, dtype=np.int16).reshape(3, 4)
    reader = reader_of(
        written({"w": (TensorSpec("I16", (3, 4)), values.tobytes()), "b": (TensorSpec("I8", (1,)), b"!")})
    )
    assert bytes(reader.read_block("w", 5, 9)) == values.reshape(-1)[5:9].tobytes()
    assert bytes(reader.read_block("w", 5, 5)) == b""


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 2**32), st.integers(1, 9))
def test_the_head_and_every_block_make_up_the_file(spec: dict[str, TensorSpec], seed: int, num_elements: int) -> None:
    data = written(filled(spec, seed))
    reader = reader_of(data)
    blocks = list(blocks_of(reader.spec, num_elements))
    assert all(0 < stop - start <= num_elements for _, start, stop in blocks)
    assert reader.head + b"".join(reader.read_block(*block) for block in blocks) == data


def test_the_blocks_of_a_tensor_cover_every_element_once() -> None:
    assert list(block_ranges("w", 5, 2)) == [("w", 0, 2), ("w", 2, 4), ("w", 4, 5)]
    assert list(block_ranges("w", 0, 2)) == []


def test_a_spec_knows_elements_bytes_and_kind() -> None:
    entry = TensorSpec("BF16", (3, 5))
    assert (entry.num_elements, entry.num_bytes, entry.kind) == (15, 30, "float")
    assert TensorSpec("I64", ()).num_elements == 1
    assert [TensorSpec(code, ()).kind for code in ("F64", "U8", "BOOL")] == ["float", "int", "bool"]
    assert str(TensorSpec("F32", (2, 3))) == "F32 [2, 3]"


def test_buffers_that_do_not_add_up_to_the_spec_are_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="add up"):
        write_and_hash(io.BytesIO(), {"w": TensorSpec("F32", (2,))}, [b"1234"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"", "header claims 0 bytes, but the file has 0", id="an empty file"),
        pytest.param(b"1234567", "but the file has 7", id="less than the length of the header"),
        pytest.param((99).to_bytes(8, "little") + b"{}", "claims 99 bytes", id="a header longer than the file"),
        pytest.param((2**63).to_bytes(8, "little") + b"{}", "claims", id="a header of absurd length"),
        pytest.param(file_with(b"{not json"), "not JSON", id="a header that is not JSON"),
        pytest.param(file_with(b"\xff\xfe{}"), "not JSON", id="a header that is no text"),
        pytest.param(file_with(b"[" * 100_000), "not JSON", id="a header nested too deep"),
        pytest.param(file_with([1, 2]), "not a JSON object", id="a header that is a list"),
        pytest.param(file_with({"w": "F32"}), "entry of 'w' is malformed", id="an entry that is no object"),
        pytest.param(file_with({"w": {"dtype": "F32"}}), "malformed", id="an entry without a shape"),
        pytest.param(
            file_with({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
            "malformed",
            id="an entry with one offset",
        ),
        pytest.param(
            file_with({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
            "malformed",
            id="a list as dtype",
        ),
        pytest.param(
            file_with({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"),
            "unknown dtype",
            id="a dtype that may not travel",
        ),
        pytest.param(
            file_with({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
            "bad shape",
            id="a negative size",
        ),
        pytest.param(
            file_with({"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"),
            "bad shape",
            id="a broken size",
        ),
        pytest.param(
            file_with({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
            "bad shape",
            id="a bool as size",
        ),
        pytest.param(
            file_with({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
            r"'w' is F32 \[2\] but has 4 bytes",
            id="a span shorter than the shape",
        ),
        pytest.param(
            file_with({name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for name in "ab"}, b"12"),
            "overlap",
            id="tensors that overlap",
        ),
        pytest.param(
            file_with({"w": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}}, b"12345"),
            "gap at byte 0",
            id="a hole",
        ),
        pytest.param(
            file_with({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"1"),
            "header describes",
            id="a body too short",
        ),
        pytest.param(
            file_with({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"123"),
            "header describes",
            id="bytes behind it",
        ),
    ],
)
def test_bytes_that_are_no_sound_file_are_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(IntegrityError, match=words) as refused:
        reader_of(data)
    assert str(refused.value).startswith("the file is not a valid safetensors file")


def test_a_header_over_the_limit_is_not_even_read() -> None:
    asked: list[tuple[int, int]] = []
    length = MAX_HEADER_BYTES + 1

    def read_range(start: int, stop: int) -> bytearray:
        asked.append((start, stop))
        return bytearray(length.to_bytes(8, "little"))

    with pytest.raises(IntegrityError, match="header claims"):
        TensorReader(read_range, length + 8, where="the file")
    assert asked == [(0, 8)]


def test_a_file_that_shrank_after_its_header_was_read_is_refused() -> None:
    data = written({"w": (TensorSpec("F32", (4,)), bytes(16))})
    reader = reader_of(data, read=data[:-3])
    with pytest.raises(IntegrityError, match="ended inside 'w'"):
        reader.read_block("w", 0, 4)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=4), st.data())
def test_a_damaged_file_is_read_or_refused_and_never_anything_else(damage: bytes, data: st.DataObject) -> None:
    sound = written(filled({"w": TensorSpec("F32", (2, 2)), "b": TensorSpec("BOOL", (3,))}, 0))
    at = data.draw(st.integers(0, len(sound) - 1))
    broken = sound[:at] + damage + sound[at + len(damage) :]
    try:
        reader = reader_of(broken)
    except IntegrityError:
        return
    assert sum(entry.num_bytes for entry in reader.spec.values()) < len(broken)


def test_what_is_hashed_in_batches_is_what_lies_in_the_file() -> None:
    pieces = [bytes([number]) * size for number, size in enumerate((3 << 20, 1, 9 << 20, (4 << 20) - 1, 7))]
    spec = {"w": TensorSpec("U8", (sum(map(len, pieces)),))}
    file = io.BytesIO()
    digest = write_and_hash(file, spec, pieces)
    assert file.getvalue().endswith(b"".join(pieces))
    assert digest == Digest(hashlib.sha256(file.getvalue()).hexdigest(), len(file.getvalue()))


def test_a_file_that_cannot_be_written_stops_the_stream() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(28, "No space left on device")

    pulled = []

    def pieces() -> Iterator[bytes]:
        for number in range(100):
            pulled.append(number)
            yield bytes(1 << 20)

    with pytest.raises(OSError, match="No space left"):
        write_and_hash(Full(), {"w": TensorSpec("U8", (100 << 20,))}, pieces())
    assert len(pulled) < 20
