"""What isn't a regular file is no object of a local store: nothing reads it or waits for it."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpool.errors import IntegrityError
from fedpool.store import Store

PATH = "job/rounds/00000/sites/site-1/update.json"
READS: dict[str, Callable[[Store, Path], object]] = {
    "size": lambda store, folder: store.size(PATH),
    "open": lambda store, folder: store.open(PATH).read(),
    "bytes": lambda store, folder: store.read_bytes(PATH),
    "a few bytes": lambda store, folder: store.read_bytes(PATH, 100),
    "JSON": lambda store, folder: store.read_json(PATH),
    "a range": lambda store, folder: store.read_range(PATH, 0, 2),
    "tensors": lambda store, folder: store.tensors(PATH, 2),
    "a local file": lambda store, folder: store.fetch(PATH, folder),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store" / PATH).parent.mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/update.json").write_text("{}")
    return Store(tmp_path / "store")


def in_time(work: Callable[[], object], fifo: Path) -> object:
    """The result of some work that must not wait for a writer of a FIFO."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001  # the caller's thread raises it
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    hangs = thread.is_alive()
    if fifo.is_fifo():
        os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))  # who waits there goes on
    assert not hangs, "it waits for ever"
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def put(kind: str, at: Path, theirs: Path) -> None:
    """Put something else in the place of an object."""
    match kind:
        case "a FIFO":
            os.mkfifo(at)
        case "a socket":
            short = Path(os.path.relpath(at))  # a socket's path must be short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(short))
        case "a folder":
            at.mkdir()
        case "a device":
            at.symlink_to("/dev/null")
        case "a link to nothing":
            at.symlink_to(theirs / "nothing")
        case "a link":
            at.symlink_to(theirs / "update.json")


KINDS = {
    "a FIFO": "a FIFO",
    "a socket": "a socket",
    "a folder": "a folder",
    "a device": "a symbolic link",
    "a link to nothing": "a symbolic link",
    "a link": "a symbolic link",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", READS)
def test_it_is_refused_by_its_path_however_it_is_read(
    kind: str, read: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Path(store.full(PATH))
    monkeypatch.chdir(at.parent)
    put(kind, at, tmp_path / "theirs")
    assert store.exists(PATH)
    with pytest.raises(IntegrityError, match=rf"{PATH} is {KINDS[kind]}, .* remove it"):
        in_time(lambda: READS[read](store, tmp_path), at)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_folder_of_the_job_that_is_a_link_is_refused_as_well(
    read: str, depth: int, store: Store, tmp_path: Path
) -> None:
    linked = Path(store.full("job/rounds"), *Path(PATH).parts[2 : 2 + depth])
    linked.rename(tmp_path / "moved")
    linked.symlink_to(tmp_path / "moved")
    Path(store.full(PATH)).write_text("{}")
    with pytest.raises(IntegrityError, match=rf"{linked} is a symbolic link"):
        READS[read](store, tmp_path)


def test_a_store_or_a_job_that_is_a_link_is_read_like_any_other_and_so_is_a_hard_link(tmp_path: Path) -> None:
    big_disk = tmp_path / "big-disk"
    (big_disk / "job" / "rounds").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "job").symlink_to(big_disk / "job")
    (tmp_path / "linked").symlink_to(tmp_path / "store")
    (big_disk / "original").write_text("{}")
    (big_disk / "job/rounds/a.json").hardlink_to(big_disk / "original")
    store = Store(tmp_path / "linked")
    assert store.read_json("job/rounds/a.json") == {}
    assert store.size("job/rounds/a.json") == 2
    assert store.fetch("job/rounds/a.json", tmp_path).read_text() == "{}"


def test_what_is_behind_a_link_is_neither_settled_nor_removed(store: Store, tmp_path: Path) -> None:
    at = Path(store.full(PATH))
    at.symlink_to(tmp_path / "theirs/update.json")
    store.settle(PATH)
    store.remove(PATH)
    assert not at.is_symlink()
    at.parent.rmdir()
    at.parent.symlink_to(tmp_path / "theirs")
    store.settle(PATH)
    store.remove(PATH)
    assert (tmp_path / "theirs/update.json").exists()


def test_a_fifo_is_settled_and_removed_in_time(store: Store) -> None:
    at = Path(store.full(PATH))
    os.mkfifo(at)
    in_time(lambda: store.settle(PATH), at)
    in_time(lambda: store.remove(PATH), at)
    assert not at.exists()


def test_the_error_about_a_missing_object_has_its_whole_path(store: Store) -> None:
    for path in (PATH, "job/nowhere/a.json", "nothing/a/b.json", "nothing.json"):
        with pytest.raises(FileNotFoundError, match=store.full(path)):
            store.read_bytes(path)
