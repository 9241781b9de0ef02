"""The store: one suite over a local folder and fsspec's `memory://`, then tests specific to one of
them.
"""

import errno
import hashlib
import io
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedpool.arrays import save_and_hash
from fedpool.digest import check_digest, hash_file
from fedpool.errors import FedpoolError, IntegrityError, RecipeError, StoreError
from fedpool.paths import JobPaths, check_name, check_new_names
from fedpool.store import Store, to_json
from fedpool.tensors import Digest, TensorSpec


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(tmp_path / "store")
    else:
        made = Store(f"memory://fedpool-{uuid.uuid4().hex}")
        yield made
        if made.fs.exists(made.root):
            made.fs.rm(made.root, recursive=True)


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest(), len(data))


def test_bytes_come_back_as_they_were_written(store: Store) -> None:
    store.write_bytes("job/a.bin", b"some bytes")
    assert store.exists("job/a.bin")
    with store.open("job/a.bin") as file:
        assert file.read() == b"some bytes"


def test_a_file_opened_to_read_can_seek(store: Store) -> None:
    store.write_bytes("job/a.bin", b"0123456789")
    with store.open("job/a.bin") as file:
        file.seek(7)
        assert file.read() == b"789"


def test_json_comes_back_as_it_was_written_and_its_digest_is_that_of_the_bytes(store: Store) -> None:
    digest = store.write_json("job/job.json", {"b": [1, None, "ä"], "a": 0.1})
    assert store.read_json("job/job.json") == {"a": 0.1, "b": [1, None, "ä"]}
    with store.open("job/job.json") as file:
        assert digest == digest_of(file.read())


def test_nothing_is_overwritten_and_the_first_object_stays(store: Store) -> None:
    store.write_json("job/job.json", {"first": True})
    for write in (
        lambda: store.write_json("job/job.json", {"second": True}),
        lambda: store.write_bytes("job/job.json", b"x"),
    ):
        with pytest.raises(StoreError, match=r"job\.json exists already.*use a new job_id"):
            write()
    assert store.read_json("job/job.json") == {"first": True}


def test_a_local_file_is_adopted_once_and_moves(store: Store, tmp_path: Path) -> None:
    local = tmp_path / "update"
    local.write_bytes(b"update")
    store.adopt(local, "job/sites/site-1/update")
    assert not local.exists()
    with store.open("job/sites/site-1/update") as file:
        assert file.read() == b"update"
    local.write_bytes(b"second update")
    with pytest.raises(StoreError, match="exists already"):
        store.adopt(local, "job/sites/site-1/update")
    assert local.read_bytes() == b"second update"


def test_a_staged_object_appears_only_when_its_block_ends(store: Store) -> None:
    with store.staged("job/model") as file:
        file.write(b"half ")
        assert not store.exists("job/model")
        file.write(b"whole")
    with store.open("job/model") as read:
        assert read.read() == b"half whole"


def test_a_staged_object_vanishes_when_its_block_raises(store: Store) -> None:
    with pytest.raises(RuntimeError, match="out of battery"), store.staged("job/model") as file:
        file.write(b"half")
        raise RuntimeError("out of battery")
    assert not store.exists("job/model")
    assert store.names("job") == []


def test_names_are_sorted_and_a_missing_folder_has_none(store: Store) -> None:
    for site in ("site-2", "site-10", "site-1"):
        store.write_bytes(f"job/sites/{site}/update.json", b"{}")
    assert store.names("job/sites") == ["site-1", "site-10", "site-2"]
    assert store.names("job/rounds") == []


def test_an_object_that_is_not_there_does_not_exist_and_cannot_be_read(store: Store, tmp_path: Path) -> None:
    assert not store.exists("job/nothing")
    with pytest.raises(FileNotFoundError):
        store.open("job/nothing")
    with pytest.raises(FileNotFoundError):
        store.read_json("job/nothing")
    with pytest.raises(FileNotFoundError):
        store.fetch("job/nothing", tmp_path, digest_of(b""))
    with pytest.raises(FileNotFoundError):
        store.fetch("job/nothing", tmp_path)
    with pytest.raises(FileNotFoundError):
        store.tensors("job/nothing", 100)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{broken", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "is not a JSON object"),
    ],
    ids=["broken", "no text", "too deep", "a list"],
)
def test_json_that_is_none_is_refused_with_its_path(store: Store, data: bytes, words: str) -> None:
    store.write_bytes("job/job.json", data)
    with pytest.raises(IntegrityError, match=rf"job/job\.json {words}"):
        store.read_json("job/job.json")


def test_json_that_cannot_be_written_leaves_nothing_behind(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json("job/job.json", {"loss": float("nan")})
    assert not store.exists("job/job.json")


def test_a_fetched_object_is_a_local_file_with_its_bytes(store: Store, tmp_path: Path) -> None:
    store.write_bytes("job/rounds/model", b"model")
    for digest in (None, digest_of(b"model")):
        assert store.fetch("job/rounds/model", tmp_path, digest).read_bytes() == b"model"


def test_a_copy_that_was_fetched_before_is_taken_again_unless_it_has_changed(store: Store, tmp_path: Path) -> None:
    store.write_bytes("job/model", b"model")
    digest = digest_of(b"model")
    first = store.fetch("job/model", tmp_path, digest, again=True)
    if not store.is_local:
        first.write_bytes(b"spoilt")
        assert store.fetch("job/model", tmp_path, digest, again=True).read_bytes() == b"model"
        store.remove("job/model")
        assert store.fetch("job/model", tmp_path, digest, again=True).read_bytes() == b"model"
        with pytest.raises(FileNotFoundError):
            store.fetch("job/model", tmp_path, digest)


def test_a_fetched_object_that_differs_from_its_manifest_is_refused(store: Store, tmp_path: Path) -> None:
    store.write_bytes("job/model", b"model")
    with pytest.raises(
        IntegrityError, match=r"job/model differs from its manifest: 5 bytes with sha256 \w{64}, expected 6 bytes"
    ):
        store.fetch("job/model", tmp_path, digest_of(b"model!"))


def test_tensors_are_read_block_by_block(store: Store) -> None:
    with store.staged("job/model") as file:
        digest = save_and_hash(file, {"w": np.arange(10, dtype=np.float32)})
    reader = store.tensors("job/model", digest.size)
    assert reader.spec == {"w": TensorSpec("F32", (10,))}
    assert np.frombuffer(reader.read_block("w", 3, 6), np.float32).tolist() == [3.0, 4.0, 5.0]
    assert bytes(reader.read_block("w", 3, 3)) == b""


def test_the_size_of_an_object_is_known_without_reading_it(store: Store) -> None:
    store.write_bytes("job/a", b"12345")
    assert store.size("job/a") == 5
    with pytest.raises(FileNotFoundError):
        store.size("job/nothing")


def test_tensors_of_another_size_than_the_manifest_says_are_refused(store: Store) -> None:
    with store.staged("job/model") as file:
        digest = save_and_hash(file, {"w": np.arange(10, dtype=np.float32)})
    for size in (digest.size - 1, digest.size + 1):
        with pytest.raises(IntegrityError, match="job/model is not a valid safetensors file"):
            store.tensors("job/model", size)


def test_a_store_opened_by_its_url_holds_the_same_objects(store: Store) -> None:
    store.write_bytes("job/a", b"1")
    again = Store(store.url)
    assert again.exists("job/a")
    assert again.full("job/a") == store.full("job/a")


def test_only_local_folders_are_local(store: Store) -> None:
    assert store.is_local == store.url.startswith("file://")


def test_a_local_folder_is_made_on_the_first_write_and_left_without_scratch_files(tmp_path: Path) -> None:
    root = tmp_path / "not yet" / "here #1 [x] 100%"
    store = Store(root)
    assert not root.exists()
    store.write_bytes("job/a", b"1")
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == ["job", "job/a"]
    assert Store(store.url).exists("job/a")


def test_a_fetched_local_object_is_not_copied(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.write_bytes("job/a", b"1")
    assert store.fetch("job/a", tmp_path / "unused") == tmp_path / "store" / "job" / "a"


def test_of_many_writers_to_one_local_path_exactly_one_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    won: list[bytes] = []
    start = threading.Barrier(8)

    def write(data: bytes) -> None:
        start.wait()
        try:
            store.write_bytes("job/round.json", data)
        except StoreError:
            return
        won.append(data)

    threads = [threading.Thread(target=write, args=(bytes([number]) * 100_000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "job" / "round.json").read_bytes() == won[0]


def test_a_file_from_another_file_system_is_adopted_whole_and_exclusively(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    local = elsewhere / f"fedpool-{uuid.uuid4().hex}"
    store = Store(tmp_path)
    try:
        local.write_bytes(b"from afar")
        store.adopt(local, "job/a")
        assert not local.exists()
        local.write_bytes(b"again")
        with pytest.raises(StoreError, match="exists already"):
            store.adopt(local, "job/a")
    finally:
        local.unlink(missing_ok=True)
    assert (tmp_path / "job" / "a").read_bytes() == b"from afar"
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["a"]


def test_a_file_system_without_hard_links_is_written_to_exclusively_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(errno.ENOTSUP, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    store = Store(tmp_path)
    store.write_bytes("job/a", b"first")
    with pytest.raises(StoreError, match="exists already"):
        store.write_bytes("job/a", b"second")
    assert (tmp_path / "job" / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.rglob("*")] == ["job", "a"]


def test_an_error_of_the_file_system_is_not_taken_for_something_else(tmp_path: Path) -> None:
    (tmp_path / "job").write_bytes(b"a file where a folder should be")
    with pytest.raises(StoreError, match=r"job/sites/a cannot be written: NotADirectoryError"):
        Store(tmp_path).write_bytes("job/sites/a", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_the_layout_is_the_one_of_the_architecture() -> None:
    paths = JobPaths("hello-1")
    assert paths.job == "hello-1/job.json"
    assert paths.result == "hello-1/result.json"
    assert paths.bundle("a" * 64) == f"hello-1/bundle-{'a' * 64}.zip"
    assert paths.global_model(0) == "hello-1/rounds/00000/global.safetensors"
    assert paths.record(12) == "hello-1/rounds/00012/round.json"
    assert paths.sites(3) == "hello-1/rounds/00003/sites"
    assert paths.update(3, "site-1") == "hello-1/rounds/00003/sites/site-1/update.safetensors"
    assert paths.manifest(3, "site-1") == "hello-1/rounds/00003/sites/site-1/update.json"


@pytest.mark.parametrize("name", ["a", "0", "site-1", "Hello_World.v2", "a..b", "x" * 128])
def test_plain_names_may_be_part_of_a_path(name: str) -> None:
    assert check_name("site", name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../up",
        "a/b",
        "a\\b",
        "/abs",
        ".hidden",
        "-flag",
        "a b",
        "a\n",
        "ä",
        "a\0",
        "x" * 129,
        "s3:x",
        None,
        3,
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"site .* cannot be part of a path"):
        check_name("site", name)


def test_every_name_from_outside_is_checked_where_paths_are_built() -> None:
    paths = JobPaths("job")
    for build in (lambda: JobPaths("../job"), lambda: paths.update(0, "../../x"), lambda: paths.manifest(0, "a/b")):
        with pytest.raises(RecipeError, match="cannot be part of a path"):
            build()
    for sha256 in ("", "a" * 63, "A" * 64, "../" + "a" * 61):
        with pytest.raises(RecipeError, match="is not a sha256 in hex"):
            paths.bundle(sha256)
    with pytest.raises(RecipeError, match="numbered from 0"):
        paths.global_model(-1)


def test_json_has_one_form() -> None:
    assert to_json({"b": 1, "a": [1, 2]}) == b'{\n  "a": [\n    1,\n    2\n  ],\n  "b": 1\n}\n'
    assert json.loads(to_json({"x": 0.1})) == {"x": 0.1}


def test_a_digest_is_taken_from_the_beginning_of_a_file_wherever_it_stands() -> None:
    data = bytes(3 << 20) + b"end"
    file = io.BytesIO(data)
    file.seek(5)
    assert hash_file(file) == digest_of(data)
    check_digest(file, digest_of(data), where="it")


def test_every_error_of_the_store_is_of_fedpools_tree() -> None:
    assert issubclass(IntegrityError, StoreError)
    assert issubclass(StoreError, FedpoolError)


@pytest.mark.parametrize("name", ["nul", "CON", "con.txt", "aux.", "Com1", "lpt9.log", "a.", "site-1."])
def test_a_new_name_that_windows_would_change_is_refused_though_a_stored_one_is_read(name: str) -> None:
    assert check_name("site", name) == name
    with pytest.raises(RecipeError, match=f"site '{name}' .*choose another name"):
        check_new_names("site", [name])


@pytest.mark.parametrize("names", [["a", "A"], ["site-1", "b", "SITE-1"]])
def test_new_names_that_differ_only_in_case_are_refused(names: list[str]) -> None:
    with pytest.raises(RecipeError, match=f"'{names[0]}' and site '{names[-1]}' differ only in case"):
        check_new_names("site", names)


@pytest.mark.parametrize("name", ["\u00e9", "e\u0301", "\uff21", "\u212a"])
def test_no_two_names_can_differ_only_in_their_unicode_form(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be part of a path"):
        check_new_names("site", [name])


def test_names_that_only_resemble_a_device_are_accepted() -> None:
    check_new_names("site", ["console", "nul-1", "com", "com10", "a.b", "con-site.x"])
