"""Tensors read in checked blocks: they are the bytes whose tags were taken, in whatever pieces."""

from collections.abc import Mapping
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool.arrays import save_and_hash
from fedpool.checked import CheckedTensors, tags_of, take_tags
from fedpool.errors import IntegrityError, ModelChanged
from fedpool.store import Store
from fedpool.tasks.committed import Committed
from fedpool.tensors import Digest

VALUES: Mapping[str, Any] = {
    "a": np.arange(10, dtype=np.float32),
    "b": np.arange(7, dtype=np.int8),
    "none": np.zeros(0),
}
BLOCK = 4


def put(store: Store, values: Mapping[str, Any], path: str = "job/model") -> Digest:
    with store.staged(path) as file:
        return save_and_hash(file, values)


def overwrite(store: Store, values: Mapping[str, Any], path: str = "job/model") -> None:
    with Path(store.full(path)).open("r+b") as file:
        save_and_hash(file, values)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    made.block_elements = BLOCK
    return made


def test_any_range_is_read_whatever_the_blocks_are(store: Store) -> None:
    reader = store.tensors("job/model", put(store, VALUES).size)
    _, tags = take_tags(reader, BLOCK)
    for start, stop in combinations_with_replacement(range(11), 2):
        data = CheckedTensors(reader, lambda: tags).read_block("a", start, stop)
        assert np.frombuffer(data, np.float32).tolist() == list(range(start, stop))
        assert not memoryview(data).readonly


def test_the_digest_is_that_of_the_file(store: Store) -> None:
    digest = put(store, VALUES)
    assert take_tags(store.tensors("job/model", digest.size), BLOCK)[0] == digest


@pytest.mark.parametrize("at", range(10))
def test_a_change_is_found_in_every_range_that_it_lies_in_and_in_no_other(at: int, store: Store) -> None:
    reader = store.tensors("job/model", put(store, VALUES).size)
    _, tags = take_tags(reader, BLOCK)
    checked = CheckedTensors(reader, lambda: tags)
    changed = np.arange(10, dtype=np.float32)
    changed[at] += 1
    overwrite(store, {**VALUES, "a": changed})
    first = at - at % BLOCK
    for start, stop in ((first, min(first + BLOCK, 10)), (at, at + 1), (0, 10)):
        with pytest.raises(IntegrityError, match="job/model was changed after it was checked: 'a' differs"):
            checked.read_block("a", start, stop)
    other = (first + BLOCK) % 12
    checked.read_block("a", other, min(other + BLOCK, 10))
    checked.read_block("b", 0, 7)
    with pytest.raises(IntegrityError, match="'a' differs"):
        checked.check()


def test_a_block_does_not_fit_in_the_place_of_another(store: Store) -> None:
    reader = store.tensors("job/model", put(store, {"a": np.arange(8, dtype=np.float32)}).size)
    _, tags = take_tags(reader, BLOCK)
    overwrite(store, {"a": np.roll(np.arange(8, dtype=np.float32), BLOCK)})
    with pytest.raises(IntegrityError, match="'a' differs"):
        CheckedTensors(reader, lambda: tags).read_block("a", 0, BLOCK)


def test_a_file_that_has_other_shapes_is_found(store: Store) -> None:
    _, tags = take_tags(store.tensors("job/model", put(store, VALUES).size), BLOCK)
    other = store.tensors("job/other", put(store, {**VALUES, "a": np.zeros((2, 5), np.float32)}, "job/other").size)
    with pytest.raises(IntegrityError, match="job/other was changed after it was checked: its names or shapes differ"):
        CheckedTensors(other, lambda: tags).read_block("a", 0, 4)


def test_a_file_that_was_cut_off_is_found(store: Store) -> None:
    digest = put(store, VALUES)
    reader = store.tensors("job/model", digest.size)
    _, tags = take_tags(reader, BLOCK)
    with Path(store.full("job/model")).open("r+b") as file:
        file.truncate(digest.size - 20)
    with pytest.raises(IntegrityError, match=r"job/model was changed after it was checked: .* it ended inside"):
        CheckedTensors(reader, lambda: tags).check()


def test_tags_are_only_taken_of_the_bytes_with_the_digest(store: Store) -> None:
    digest = put(store, VALUES)
    reader = store.tensors("job/model", digest.size)
    overwrite(store, {**VALUES, "a": VALUES["a"] + 1})
    with pytest.raises(ModelChanged, match="job/model differs from its manifest"):
        tags_of(reader, digest, BLOCK)


class TestCommitted:
    def test_what_was_written_before_is_read_once_and_checked_from_then_on(self, store: Store) -> None:
        digest = put(store, VALUES)
        opened = Committed(store).tensors("job/model", digest)
        assert np.frombuffer(opened.read_block("b", 0, 4), np.int8).tolist() == [0, 1, 2, 3]
        overwrite(store, {**VALUES, "a": VALUES["a"] + 1})
        with pytest.raises(ModelChanged, match="'a' differs"):
            opened.read_block("a", 0, 4)

    def test_a_change_before_the_first_block_is_found_in_whatever_block_it_lies(self, store: Store) -> None:
        digest = put(store, VALUES)
        opened = Committed(store).tensors("job/model", digest)
        overwrite(store, {**VALUES, "a": VALUES["a"] + 1})
        with pytest.raises(ModelChanged, match="differs from its manifest"):
            opened.read_block("b", 0, 4)

    def test_what_has_other_names_or_is_missing_is_refused(self, store: Store) -> None:
        committed, digest = Committed(store), put(store, VALUES)
        with pytest.raises(ModelChanged, match="job/nothing is missing"):
            committed.tensors("job/nothing", digest)
        wanted = {**store.tensors("job/model", digest.size).spec}
        del wanted["b"]
        with pytest.raises(ModelChanged, match="is not the model of this job"):
            committed.tensors("job/model", digest, wanted)
        with pytest.raises(ModelChanged, match="is not a valid safetensors file"):
            committed.tensors("job/model", Digest(digest.sha256, digest.size - 1))

    def test_a_copy_is_checked_against_the_tags_of_its_original(self, store: Store) -> None:
        committed, digest = Committed(store), put(store, VALUES)
        committed.checked("job/model", digest)
        put(store, {**VALUES, "a": VALUES["a"] + 1}, "job/copy")
        with pytest.raises(ModelChanged, match="job/copy was changed after it was checked: 'a' differs"):
            committed.checked("job/copy", digest)

    def test_the_oldest_tags_are_forgotten_and_taken_again(self, store: Store) -> None:
        committed, digests = Committed(store), {}
        for number in range(20):
            digests[number] = put(store, {"a": np.full(9, number, np.float32)}, f"job/{number}")
            committed.checked(f"job/{number}", digests[number])
        opened = committed.tensors("job/0", digests[0])
        assert np.frombuffer(opened.read_block("a", 8, 9), np.float32).tolist() == [0]
