"""The programs that other tests run against are real, and the store works on S3 as it does
elsewhere.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import sqlalchemy
from playwright.sync_api import sync_playwright
from sqlalchemy.ext.asyncio import create_async_engine

from fedpool.arrays import save_and_hash
from fedpool.errors import IntegrityError, StoreError, StoreRefused
from fedpool.store import Store
from fedpool.tensors import Digest, blocks_of
from tests.services import CHROMIUM_MISSING, PostgresServer, S3Server, find_chromium


@pytest.fixture
def store(s3_server: S3Server) -> Iterator[Store]:
    s3_server.start()  # an earlier test may have failed with the server stopped
    yield Store(f"{s3_server.url}/{uuid.uuid4().hex}")


def ask(url: str, statement: str) -> list[object]:
    """The first column of the statement's rows, through SQLAlchemy as Prefect uses it."""

    async def answer() -> list[object]:
        engine = create_async_engine(url)
        try:
            async with engine.begin() as connection:
                result = await connection.execute(sqlalchemy.text(statement))
                return list(result.scalars()) if result.returns_rows else []
        finally:
            await engine.dispose()

    return asyncio.run(answer())


def test_postgres_answers_through_sqlalchemy_and_has_what_prefect_needs(postgres: PostgresServer) -> None:
    assert ask(postgres.url, "select 1") == [1]
    assert "pg_trgm" in ask(postgres.url, "select extname from pg_extension")
    assert ask(postgres.url, "select similarity('prefect', 'perfect') > 0") == [True]


def test_a_new_database_is_empty(postgres: PostgresServer) -> None:
    first, second = postgres.new_database(), postgres.new_database()
    ask(first, "create table job (id int)")
    tables = "select count(*) from information_schema.tables where table_schema = 'public'"
    assert ask(first, tables) == [1]
    assert ask(second, tables) == [0]


def test_postgres_and_s3_leave_no_process_and_no_file(postgres: PostgresServer, s3_server: S3Server) -> None:
    # The fixtures are here only to skip the test if a program is missing.
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with closing(PostgresServer()) as database, closing(S3Server()) as objects:
        started = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
        folders = [database._folder, objects._folder]
        assert {"postgres", "rclone"} <= {process.name() for process in started}
    assert not [process for process in started if process.is_running()]
    assert not [folder for folder in folders if folder.exists()]


def test_the_programs_end_when_the_tests_are_killed(postgres: PostgresServer, s3_server: S3Server) -> None:
    script = """
import psutil
from tests.services import PostgresServer, S3Server
servers = PostgresServer(), S3Server()
print(*[process.pid for process in psutil.Process().children(recursive=True)])
print(*[server._folder for server in servers], flush=True)
input()
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        started = [psutil.Process(int(pid)) for pid in killed.stdout.readline().split()]
        folders = killed.stdout.readline().split()
        killed.kill()
    assert len(started) > 4
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive
    for folder in folders:  # nothing was left to remove them
        shutil.rmtree(folder)


def test_json_comes_back_from_s3_as_it_was_written(store: Store, s3_server: S3Server) -> None:
    digest = store.write_json("job/job.json", {"b": [1, None, "ä"], "a": 0.1})
    assert store.read_json("job/job.json") == {"a": 0.1, "b": [1, None, "ä"]}
    assert (store.exists("job/job.json"), store.size("job/job.json")) == (True, digest.size)
    full = store.full("job/job.json")
    assert full == f"{store.url.removeprefix('s3://')}/job/job.json"
    assert (s3_server.objects.parent / full).stat().st_size == digest.size
    with store.open("job/job.json") as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == b"}\n"


def test_an_object_on_s3_is_written_once_and_the_first_stays(store: Store, tmp_path: Path) -> None:
    store.write_json("job/job.json", {"first": True})
    local = tmp_path / "update"
    local.write_bytes(b"second")
    for write in (
        lambda: store.write_json("job/job.json", {"second": True}),
        lambda: store.adopt(local, "job/job.json"),
    ):
        with pytest.raises(StoreError, match=r"job/job\.json exists already.*use a new job_id"):
            write()
    assert local.exists()
    assert store.read_json("job/job.json") == {"first": True}


def test_names_on_s3_are_those_of_objects_and_folders(store: Store) -> None:
    assert store.names("job/rounds") == []
    for path in ("job/rounds/00001/b.json", "job/rounds/00000/a.json", "job/rounds/00000/deep/c.json"):
        store.write_bytes(path, b"")
    assert store.names("job/rounds") == ["00000", "00001"]
    assert store.names("job/rounds/00000") == ["a.json", "deep"]
    assert not store.exists("job/rounds/00000/b.json")


def test_what_another_client_writes_to_s3_is_there_at_once(store: Store) -> None:
    store.write_bytes("job/sites/a/update.json", b"{}")
    assert (store.names("job/sites"), store.names("job/sites/a")) == (["a"], ["update.json"])
    other = Store(store.url, skip_instance_cache=True)
    other.write_bytes("job/sites/a/more.json", b"{}")
    other.write_bytes("job/sites/b/update.json", b"{}")
    assert (store.names("job/sites"), store.names("job/sites/a")) == (["a", "b"], ["more.json", "update.json"])
    assert store.exists("job/sites/a/more.json")
    assert store.size("job/sites/a/more.json") == 2


def test_fetch_copies_an_object_of_s3_into_the_folder_and_checks_it(store: Store, tmp_path: Path) -> None:
    digest = store.write_json("job/job.json", {"a": 1})
    local = store.fetch("job/job.json", tmp_path, digest)
    assert local.parent == tmp_path
    assert json.loads(local.read_bytes()) == {"a": 1}
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        store.fetch("job/job.json", tmp_path, Digest("0" * 64, digest.size))
    with pytest.raises(FileNotFoundError):
        store.fetch("job/none.json", tmp_path)


def test_tensors_are_read_from_s3_by_ranges(store: Store) -> None:
    w = np.arange(100_000, dtype=np.float32)
    values: dict[str, np.ndarray] = {"w": w.reshape(10, -1), "b": np.ones(3, np.float16)}
    with store.staged("job/global.safetensors") as file:
        digest = save_and_hash(file, values)
    tensors = store.tensors("job/global.safetensors", digest.size)
    assert {name: spec.shape for name, spec in tensors.spec.items()} == {"w": (10, 10_000), "b": (3,)}
    assert bytes(tensors.read_block("w", 50_000, 50_002)) == w[50_000:50_002].tobytes()
    assert b"".join(tensors.read_block(*block) for block in blocks_of(tensors.spec, 30_000)) == b"".join(
        values[name].tobytes() for name in ("w", "b")
    )


def test_s3_refuses_a_wrong_secret(s3_server: S3Server) -> None:
    stranger = Store(s3_server.url, secret="wrong", key=s3_server.environment["AWS_ACCESS_KEY_ID"])
    for use in (lambda: stranger.names("job"), lambda: stranger.write_bytes("job/job.json", b"")):
        with pytest.raises(StoreRefused, match="the secret key does not belong to the access key"):
            use()


def test_s3_that_was_stopped_refuses_and_has_its_objects_when_started_again(store: Store, s3_server: S3Server) -> None:
    store.write_json("job/job.json", {"a": 1})
    s3_server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(s3_server.endpoint, trust_env=False)
    s3_server.start()
    assert store.read_json("job/job.json") == {"a": 1}


def test_a_short_cut_of_s3_is_one_that_the_store_does_not_notice(store: Store, s3_server: S3Server) -> None:
    s3_server.stop()
    timer = threading.Timer(0.3, s3_server.start)
    timer.start()
    store.write_json("job/job.json", {"a": 1})
    timer.join()
    assert store.read_json("job/job.json") == {"a": 1}


@pytest.mark.slow
def test_chromium_opens_a_page_through_playwright() -> None:
    program = find_chromium()
    if program is None:
        pytest.skip(CHROMIUM_MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto("data:text/html,<title>a page</title>")
        assert page.title() == "a page"
        browser.close()
