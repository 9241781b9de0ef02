"""The process of a private Prefect server: serves on the loopback until its standard input ends.

Run as `python -m fedpool.deployments.server_process SOCKET CACHE`, with the number of an inherited
socket that listens. Its parent holds the other end of its standard input, so the server ends with
the parent, however that ends. With a third argument, `stay`, it outlives its parent.

Prefect creates its tables by running every migration it ever had, which takes most of a server's
start. The empty tables are always the same, so they are kept in CACHE (a SQLite file per version of
Prefect) and copied into the next server's memory. Prefect's migrations are skipped then, because
even finding nothing to do takes them a quarter of a second.
"""

import asyncio
import gc
import os
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

gc.disable()  # during imports, whose objects stay: searching them for garbage would take a quarter of the time

import aiosqlite  # noqa: E402
import prefect  # noqa: E402
import uvicorn  # noqa: E402
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL  # noqa: E402

from fedpool.deployments.local_app import local_app  # noqa: E402
from fedpool.tasks.prefect_internals import server_app, server_database  # noqa: E402


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread that holds its lock would break the interpreter's shutdown
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def _memory(database: Any) -> AsyncIterator[Any]:
    """The server's SQLite connection. It is the only one in Prefect's pool, so hold it briefly."""
    engine = await database.engine()
    async with engine.connect() as connection:
        yield (await connection.get_raw_connection()).driver_connection


async def _prepare_tables(cache: Path, *, known: bool) -> None:
    """Create the tables from the cache if it exists; otherwise create them and fill the cache."""
    database = server_database()
    if known:
        async with aiosqlite.connect(cache) as source, _memory(database) as memory:
            await source.backup(memory)
            await memory.execute_fetchall("SELECT version_num FROM alembic_version")  # fails if there are no tables
    else:
        await database.create_db()
        partial = cache.with_suffix(f".{os.getpid()}")
        with suppress(OSError, sqlite3.OperationalError):  # without a writable folder, do without the cache
            cache.parent.mkdir(parents=True, exist_ok=True)
            async with _memory(database) as memory, aiosqlite.connect(partial) as target:
                await memory.backup(target)
            partial.replace(cache)


async def main(listening: socket.socket, tables: Path, *, known: bool, stay: bool) -> None:
    """Serve Prefect's API and UI."""
    if not stay:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if ":memory:" in PREFECT_API_DATABASE_CONNECTION_URL.value():  # other databases are migrated when the server starts
        try:
            await _prepare_tables(tables, known=known)
        except sqlite3.DatabaseError:  # the cache is damaged: create the tables again
            await _prepare_tables(tables, known=False)
    config = uvicorn.Config(lambda: local_app(server_app()), factory=True, log_level="warning", lifespan="on")
    await _Server(config).serve(sockets=[listening])


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    os.umask(0o077)  # a database in a file is only for its owner
    _tables = Path(sys.argv[2]) / f"prefect-{prefect.__version__}.sqlite"
    _socket = socket.socket(fileno=int(sys.argv[1]))
    asyncio.run(main(_socket, _tables, known=_tables.exists(), stay=sys.argv[3:] == ["stay"]))
