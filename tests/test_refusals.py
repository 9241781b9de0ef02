"""What a store says when it refuses: one sentence with the remedy, at once; and what it tolerates.
Against real S3 servers.
"""

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import fsspec
import numpy as np
import pytest

from fedpool import ConfigError, StoreError
from fedpool.arrays import save_and_hash
from fedpool.errors import StoreRefused
from fedpool.store import Store
from tests import services


@pytest.fixture
def aws(s3_server: services.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a user who has set what the production guide says, and nothing about
    checksums.
    """
    file_systems = fsspec.get_filesystem_class("s3")
    monkeypatch.delenv("AWS_RESPONSE_CHECKSUM_VALIDATION")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    file_systems.clear_instance_cache()
    yield monkeypatch
    file_systems.clear_instance_cache()


def refused(store: Store) -> str:
    """What the store says for every kind of use, each within the time that botocore takes to
    connect.
    """
    said = set()
    for use in (
        lambda: store.names("job"),
        lambda: store.tree("job"),
        lambda: store.read_bytes("job/round.json"),
        lambda: store.size("job/round.json"),
        lambda: store.write_bytes("job/round.json", b"{}"),
        lambda: store.open("job/round.json"),
        lambda: store.tensors("job/round.json", 100),
    ):
        began = time.monotonic()
        with pytest.raises(StoreRefused) as caught:
            use()
        assert time.monotonic() - began < 45, "it was tried again, though waiting does not help"
        text = str(caught.value)
        assert text.startswith("s3://") and "\n" not in text
        said.add(text.partition(": ")[2])
    assert len(said) == 1, said
    return said.pop()


def test_ranges_are_read_from_rclone_without_any_setting(aws: pytest.MonkeyPatch, s3_server: services.S3Server) -> None:
    store = Store(f"{s3_server.url}/ranges")
    with store.staged("model") as file:
        digest = save_and_hash(file, {"w": np.arange(10, dtype=np.float32)})
    reader = store.tensors("model", digest.size)
    assert np.frombuffer(reader.read_block("w", 3, 6), np.float32).tolist() == [3.0, 4.0, 5.0]


def test_what_the_user_says_of_checksums_counts(aws: pytest.MonkeyPatch, s3_server: services.S3Server) -> None:
    assert Store(s3_server.url).fs.config_kwargs == {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    given = Store(s3_server.url, config_kwargs={"response_checksum_validation": "when_supported", "read_timeout": 5})
    assert given.fs.config_kwargs["response_checksum_validation"] == "when_supported"
    assert given.fs.config_kwargs["read_timeout"] == 5
    aws.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert "request_checksum_calculation" not in Store(s3_server.url).fs.config_kwargs


def test_wrong_keys_are_told_at_once_and_right_ones_help(aws: pytest.MonkeyPatch, s3_server: services.S3Server) -> None:
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    aws.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = refused(Store(s3_server.url))
    assert said.startswith(
        "the secret key does not belong to the access key (SignatureDoesNotMatch); set AWS_ACCESS_KEY_ID"
    )
    aws.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert refused(Store(s3_server.url)).startswith("the store does not know the access key (InvalidAccessKeyId); ")
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    assert refused(Store(s3_server.url)).startswith("there are no S3 credentials in the environment of this process; ")
    aws.setenv("AWS_ACCESS_KEY_ID", key)
    aws.setenv("AWS_SECRET_ACCESS_KEY", secret)
    store = Store(s3_server.url)  # in the same process, as in a notebook
    store.write_bytes("job/after", b"1")
    assert store.read_bytes("job/after") == b"1"


def test_a_bucket_that_is_not_there_is_named(aws: pytest.MonkeyPatch, s3_server: services.S3Server) -> None:
    said = refused(Store("s3://no-such-bucket"))
    assert said == "there is no such bucket (NoSuchBucket); create it, or correct the store's URL"


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [("127.0.0.1:9000", "the endpoint is not a URL"), ("https://{host}", "it does not speak TLS; set AWS_CA_BUNDLE")],
    ids=["no URL", "TLS where there is none"],
)
def test_an_endpoint_that_cannot_be_one_is_told(
    aws: pytest.MonkeyPatch, s3_server: services.S3Server, endpoint: str, words: str
) -> None:
    aws.setenv("AWS_ENDPOINT_URL_S3", endpoint.format(host=s3_server.endpoint.removeprefix("http://")))
    with pytest.raises(StoreRefused, match=words):
        Store(s3_server.url).write_bytes("job/a", b"1")


@contextmanager
def alerting(description: int) -> Iterator[str]:
    """Answers each TLS handshake with a fatal alert, as OpenSSL and load balancers send it; yields
    the endpoint.
    """
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(bytes([21, 3, 3, 0, 2, 2, description]))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.mark.parametrize(
    ("alert", "refused"),
    [(80, False), (112, False), (48, True), (42, True)],
    ids=["internal error", "unrecognized name", "unknown authority", "bad certificate"],
)
def test_an_alert_of_tls_is_tried_again_but_for_one_about_certificates(
    aws: pytest.MonkeyPatch, s3_server: services.S3Server, alert: int, refused: bool
) -> None:
    with alerting(alert) as endpoint:
        aws.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = Store(s3_server.url, config_kwargs={"retries": {"max_attempts": 1}})
        store.fs.retries = 1
        store.patience_s = 0.5
        with pytest.raises(StoreError, match="cannot be written") as caught:
            store.write_bytes("job/a", b"1")
    assert isinstance(caught.value, StoreRefused) == refused


@pytest.mark.parametrize("remote", [True, False], ids=["S3", "a folder"])
def test_a_refusal_comes_without_the_tracebacks_of_what_it_came_of(
    aws: pytest.MonkeyPatch, s3_server: services.S3Server, tmp_path: Path, remote: bool
) -> None:
    aws.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    Store(tmp_path / "store").write_bytes("job/a", b"1")  # imports what the other user may not be able to read
    with pytest.raises(StoreRefused) as caught:
        if remote:
            Store(s3_server.url).write_bytes("job/a", b"1")
        else:
            with not_as_root():
                Store(folder).write_bytes("job/a", b"1")
    told = "".join(traceback.format_exception(caught.value))
    assert told.count("Traceback") == 1 and told.splitlines()[-1].endswith(str(caught.value))


def test_a_file_system_that_is_not_installed_is_told_with_its_remedy() -> None:
    with pytest.raises(ConfigError, match=r"the store 'nosuch://bucket' cannot be opened: .*nosuch"):
        Store("nosuch://bucket")


class _Answering(BaseHTTPRequestHandler):
    """Answers each request with an S3 error, as AWS documents it; rclone knows few of them."""

    server: "_ErrorServer"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        self.server.requests.append(self.command)
        status, code, more = self.server.error
        body = f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class _ErrorServer(ThreadingHTTPServer):
    error = (500, "InternalError", "")
    requests: list[str]


@contextmanager
def answering(status: int, code: str, more: str = "") -> Iterator[_ErrorServer]:
    server = _ErrorServer(("127.0.0.1", 0), _Answering)
    server.error, server.requests = (status, code, more), []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "more", "words"),
    [
        (
            403,
            "AccessDenied",
            "",
            "the credentials are valid, but do not allow it (AccessDenied); allow it in the policy",
        ),
        (403, "RequestTimeTooSkewed", "", "the clocks of this machine and of the store differ too much"),
        (400, "ExpiredToken", "", "the credentials have expired (ExpiredToken); get new ones"),
        (
            400,
            "AuthorizationHeaderMalformed",
            "<Region>eu-north-1</Region>",
            "the region is not that of the bucket (AuthorizationHeaderMalformed); set AWS_DEFAULT_REGION to the region of the "
            "bucket, eu-north-1",
        ),
    ],
)
def test_what_does_not_heal_is_asked_once_and_told(
    aws: pytest.MonkeyPatch, status: int, code: str, more: str, words: str
) -> None:
    with answering(status, code, more) as server:
        aws.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StoreRefused) as caught:
            Store("s3://bucket").tree("job")
        assert words in str(caught.value)
        assert len(server.requests) <= 2
        server.requests.clear()
        with pytest.raises(StoreRefused, match=code):  # a HEAD has no reason in its answer: a GET asks for it
            Store("s3://bucket").size("job/a")
        assert server.requests[0] == "HEAD" and "GET" in server.requests


def test_what_may_heal_is_tried_again_and_said_in_the_log(
    aws: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(503, "SlowDown") as server:
        aws.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        store = Store("s3://bucket", config_kwargs={"retries": {"max_attempts": 1}})
        store.fs.retries = 1
        store.patience_s = 2.0
        with pytest.raises(StoreError, match=r"s3://bucket/job/a cannot be written") as caught:
            store.write_bytes("job/a", b"1")
        assert not isinstance(caught.value, StoreRefused)
        assert len(server.requests) >= 2
    assert [record.getMessage().endswith("retrying for up to 2 s") for record in caplog.records] == [True]


@contextmanager
def not_as_root() -> Iterator[None]:
    """Switch to another user within the block: root may write everywhere."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


class _Bucket(BaseHTTPRequestHandler):
    """The few S3 requests that a store writes with, and conditional writes as on AWS, which rclone
    lacks.
    """

    server: "_BucketServer"
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(self.server.objects.get(self.path))

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if "list-type" in (asked := parse_qs(query)):
            names = [name.removeprefix(f"{path}/") for name in sorted(self.server.objects)]
            found = "".join(f"<Contents><Key>{n}</Key></Contents>" for n in names if n.startswith(asked["prefix"][0]))
            self._answer(f"<ListBucketResult>{found}</ListBucketResult>".encode())
        else:
            self._answer(self.server.objects.get(self.path))

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        condition = self.headers.get("If-None-Match")
        self.server.conditions.append(condition)
        if condition and self.server.refuses:
            self._error(501, "NotImplemented")
            return
        self.server.meanwhile()
        with self.server.lock:
            if condition == "*" and self.path in self.server.objects:
                self._error(412, "PreconditionFailed", "<Condition>If-None-Match</Condition>")
                return
            self.server.objects[self.path] = body
        if self.server.loses_answers:
            self.server.loses_answers -= 1
            self.close_connection = True
            return
        self._answer(b"")

    def _error(self, status: int, code: str, more: str = "") -> None:
        self._answer(f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode(), status)

    def _answer(self, body: bytes | None, status: int = 200) -> None:
        self.send_response(404 if body is None else status)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("ETag", '"tag"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class _BucketServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Bucket)
        self.objects: dict[str, bytes] = {}
        self.conditions: list[str | None] = []
        self.lock = threading.Lock()
        self.refuses = False
        self.loses_answers = 0
        self.meanwhile: Callable[[], object] = bool


@pytest.fixture
def bucket(aws: pytest.MonkeyPatch) -> Iterator[_BucketServer]:
    with _BucketServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        aws.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_of_two_that_write_at_once_to_s3_one_is_refused(bucket: _BucketServer) -> None:
    both = threading.Barrier(2)
    bucket.meanwhile = lambda: both.wait(300)  # both have found nothing there

    def write(text: bytes) -> str:
        try:
            Store("s3://bucket").write_bytes("job/round.json", text)
        except StoreError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as threads:
        said = sorted(threads.map(write, (b"mine", b"yours")))
    assert said[0] == "" and "exists already, and objects are never overwritten" in said[1]


def test_a_write_whose_answer_was_lost_is_known_again_as_its_own(bucket: _BucketServer) -> None:
    bucket.loses_answers = 1
    Store("s3://bucket").write_bytes("job/round.json", b"mine")
    assert bucket.objects["/bucket/job/round.json"] == b"mine"
    with pytest.raises(StoreError, match="exists already"):
        Store("s3://bucket").write_bytes("job/round.json", b"mine")


def test_a_server_that_refuses_conditions_is_written_to_without(bucket: _BucketServer) -> None:
    bucket.refuses = True
    store = Store("s3://bucket")
    for number in range(2):
        store.write_bytes(f"job/{number}", b"1")
    assert len(bucket.objects) == 2 and bucket.conditions[-2:] == [None, None]


def test_a_local_store_says_who_may_not_write_where(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    Store(tmp_path / "store").write_bytes("job/a", b"1")  # imports what the other user may not be able to read
    with not_as_root(), pytest.raises(StoreRefused, match=rf"{folder}.*is not allowed to; choose another folder"):
        Store(folder).write_bytes("job/a", b"1")
