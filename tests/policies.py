"""An evaluator of S3 policies, written from Amazon's rules, and an S3 server that enforces them.

Of policies it knows what `fedpool site policy` uses; anything else is an error, so that a test
doesn't pass because something was ignored.
"""

import http.client
import http.server
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Policy = Mapping[str, Any]

PREFIX, IF_NONE_MATCH, CREATION = "s3:prefix", "s3:if-none-match", "s3:ObjectCreationOperation"


def allows(policy: Policy, action: str, resource: str, context: Mapping[str, str] | None = None) -> bool:
    """Whether a policy allows a request: a statement allows it, and none denies it."""
    effects = {
        statement["Effect"]
        for statement in policy["Statement"]
        if _concerns(statement, action, resource, context or {})
    }
    assert effects <= {"Allow", "Deny"}
    return effects == {"Allow"}


def _concerns(statement: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]) -> bool:
    assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
    return (
        action in statement["Action"]
        and any(_like(pattern, resource) for pattern in statement["Resource"])
        and all(
            _holds(operator, key, wanted, context.get(key))
            for operator, keys in statement.get("Condition", {}).items()
            for key, wanted in keys.items()
        )
    )


def _holds(operator: str, key: str, wanted: Any, value: str | None) -> bool:
    assert key in (PREFIX, IF_NONE_MATCH, CREATION)
    match operator:
        case "Null":
            return (value is None) is (wanted == "true")
        case "Bool":
            return value == str(wanted)
        case "StringLike":
            return value is not None and any(_like(pattern, value) for pattern in wanted)
    raise AssertionError(f"unknown operator {operator}")


def _like(pattern: str, text: str) -> bool:
    """`*` stands for any characters, `?` for one: a slash as well."""
    expression = "".join({"*": ".*", "?": "."}.get(mark, re.escape(mark)) for mark in pattern)
    return re.fullmatch(expression, text, re.DOTALL) is not None


@dataclass(frozen=True, slots=True)
class Call:
    """A request to the server: who asked for what, and whether it was allowed."""

    key: str
    action: str
    resource: str
    context: tuple[tuple[str, str], ...]
    allowed: bool


@dataclass
class EnforcedS3:
    """An S3 server that enforces policies, in front of one that checks the signatures.

    Like Amazon's, it answers "forbidden" for a missing object to those who may not list the bucket,
    and honours `If-None-Match: *`.

    Attributes:
        upstream: `host:port` of the server behind it.
        objects: the folder with that server's objects.
        policies: access key -> policy; without one a key may do everything.
        calls: all requests so far.
    """

    upstream: str
    objects: Path
    policies: dict[str, Policy] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def _serve(self) -> None:
                outer._serve(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        key = re.search(r"Credential=([^/]+)/", request.headers.get("Authorization") or "")
        asked = _asked(request.command, request.path, dict(request.headers.items()))
        allowed = all(self._allows(key[1] if key else "", *each) for each in asked)
        if not allowed:
            return _answer(request, 403, "AccessDenied")
        path = unquote(urlsplit(request.path).path).lstrip("/")
        if request.headers.get("If-None-Match") == "*" and (self.objects / path).exists():
            return _answer(request, 412, "PreconditionFailed")
        connection = http.client.HTTPConnection(self.upstream)
        try:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        bucket = f"arn:aws:s3:::{path.partition('/')[0]}"
        missing = answer.status == 404 and asked[0][0] == "s3:GetObject"
        if missing and not self._may(key[1] if key else "", "s3:ListBucket", bucket, {}):
            return _answer(request, 403, "AccessDenied")
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                request.send_header(name, value)
        length = answer.getheader("Content-Length") if request.command == "HEAD" else str(len(data))
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        request.wfile.write(data)
        return None

    def _allows(self, key: str, action: str, resource: str, context: Mapping[str, str]) -> bool:
        allowed = self._may(key, action, resource, context)
        self.calls.append(Call(key, action, resource, tuple(sorted(context.items())), allowed))
        return allowed

    def _may(self, key: str, action: str, resource: str, context: Mapping[str, str]) -> bool:
        return key not in self.policies or allows(self.policies[key], action, resource, context)


def _answer(request: http.server.BaseHTTPRequestHandler, status: int, code: str) -> None:
    data = b"" if request.command == "HEAD" else f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/xml")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def _asked(method: str, path: str, headers: Mapping[str, str]) -> list[tuple[str, str, dict[str, str]]]:
    """(action, resource, context) of everything that a request needs to be allowed."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    name = unquote(parts.path).lstrip("/")
    resource = f"arn:aws:s3:::{name.rstrip('/') if '/' not in name.rstrip('/') else name}"
    if "/" not in name.rstrip("/"):  # a bucket
        known = {"list-type", "prefix", "delimiter", "max-keys", "encoding-type", "continuation-token", "start-after"}
        if method == "GET" and set(query) <= known:
            return [("s3:ListBucket", resource, {PREFIX: query["prefix"][0]} if "prefix" in query else {})]
        return [(f"s3:{method} bucket {'&'.join(sorted(query))}", resource, {})]
    if method in ("GET", "HEAD") and not query:
        return [("s3:GetObject", resource, {})]
    creates = (method == "PUT" and "partNumber" not in query) or (method == "POST" and "uploadId" in query)
    context = {CREATION: str(creates).lower()}
    if "If-None-Match" in headers:
        context[IF_NONE_MATCH] = headers["If-None-Match"]
    copied: list[tuple[str, str, dict[str, str]]] = []
    if "x-amz-copy-source" in headers:
        copied = [("s3:GetObject", f"arn:aws:s3:::{unquote(headers['x-amz-copy-source']).lstrip('/')}", {})]
    if method == "PUT" and set(query) <= {"partNumber", "uploadId"}:
        return [("s3:PutObject", resource, context), *copied]
    if method == "POST" and set(query) in ({"uploads"}, {"uploadId"}):
        return [("s3:PutObject", resource, context)]
    if method == "DELETE" and set(query) <= {"uploadId"}:
        return [("s3:AbortMultipartUpload" if query else "s3:DeleteObject", resource, {})]
    return [(f"s3:{method} {'&'.join(sorted(query))}", resource, {})]
