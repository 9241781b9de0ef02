"""The programs that other tests run against are real, and the store does on S3 what it does elsewhere."""

import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from fedpool.arrays import save_and_hash
from fedpool.errors import IntegrityError, StoreError
from fedpool.store import Store
from fedpool.tensors import Digest
from tests.services import CHROMIUM_MISSING, PostgresServer, S3Server, find_chromium


@pytest.fixture
def store(s3_server: S3Server) -> Iterator[Store]:
    s3_server.start()  # a test before this one may have failed with the server stopped
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
    # The fixtures are there to skip where a program is missing.
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with closing(PostgresServer()) as database, closing(S3Server()) as objects:
        started = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
        folders = [database._folder, objects._folder]
        assert {"postgres", "rclone"} <= {process.name() for process in started}
    assert not [process for process in started if process.is_running()]
    assert not [folder for folder in folders if folder.exists()]


def test_the_programs_end_when_the_tests_are_killed(postgres: PostgresServer, s3_server: S3Server, tmp_path: Path) -> None:
    script = """
import psutil, tempfile
from tests.services import PostgresServer, S3Server
servers = PostgresServer(), S3Server()
print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)
input()
"""
    killed = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        # Nobody is left to remove the folders. pytest's own temporary folder is closed to the user postgres.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with killed:
        assert killed.stdout is not None
        started = [psutil.Process(int(pid)) for pid in killed.stdout.readline().split()]
        killed.kill()
    assert len(started) > 4
    gone, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


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
