"""Reading byte ranges of local files."""

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from fedpool.local_file import LocalFile, open_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return path


@pytest.mark.parametrize("limit", [None, 1, 0])
def test_ranges_past_the_end_come_back_short(file: Path, limit: int | None) -> None:
    read = LocalFile(partial(open_file, file), None if limit is None else threading.Semaphore(limit))
    parts = (read(2, 5), read(8, 20), read(30, 40), read(3, 3))
    assert [bytes(part) for part in parts] == [b"234", b"89", b"", b""]


def test_as_many_stay_open_as_may(file: Path) -> None:
    def num_open() -> int:
        names = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(os.path.exists(name) and os.path.samefile(name, file) for name in names)

    limit = threading.Semaphore(2)
    readers = [LocalFile(partial(open_file, file), limit) for _ in range(5)]
    assert num_open() == 2
    assert {bytes(read(0, 3)) for read in readers} == {b"012"}
    del readers[0]
    assert num_open() == 1
    readers.append(LocalFile(partial(open_file, file), limit))
    assert num_open() == 2


def test_a_file_that_is_not_there_takes_no_place(file: Path, tmp_path: Path) -> None:
    limit = threading.Semaphore(1)
    with pytest.raises(FileNotFoundError):
        LocalFile(partial(open_file, tmp_path / "none"), limit)
    assert limit.acquire(blocking=False)
