"""Permanent refusals of a store or a disk, in one sentence: what, where, and the remedy.

Client scripts import this module, so modules that only a few errors need are imported there.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fedpool.errors import StoreRefused
from fedpool.s3 import chain, error_code

Doing = Literal["read", "written", "removed"]

_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or storage_options) to valid keys, and restart this process"
_REGION = "set AWS_DEFAULT_REGION to the region of the bucket"
_ALLOW = "allow it in the policy of these credentials"

_CODES: Mapping[str, tuple[str, str]] = {
    "InvalidAccessKeyId": ("the store does not know the access key", _KEYS),
    "InvalidClientTokenId": ("the store does not know the access key", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", _KEYS),
    "ExpiredToken": (
        "the credentials have expired",
        "get new ones (AWS_SESSION_TOKEN and its keys), and restart this process",
    ),
    "TokenRefreshRequired": ("the credentials have expired", "get new ones, and restart this process"),
    "InvalidToken": ("the store does not accept AWS_SESSION_TOKEN", "unset it, or get new credentials"),
    "RequestTimeTooSkewed": (
        "the clocks of this machine and of the store differ too much",
        "set the clock of this machine",
    ),
    "NoSuchBucket": ("there is no such bucket", "create it, or correct the store's URL"),
    "InvalidBucketName": ("the bucket's name is invalid", "correct the store's URL"),
    "AccessDenied": ("the credentials are valid, but do not allow it", _ALLOW),
    "AllAccessDisabled": ("all access to the bucket is disabled", "ask its owner"),
    "AccountProblem": ("there is a problem with the account that owns the bucket", "ask its owner"),
    "AuthorizationHeaderMalformed": ("the region is not that of the bucket", _REGION),
    "IllegalLocationConstraintException": ("the region is not that of the bucket", _REGION),
    "PermanentRedirect": ("the bucket is in another region, or at another endpoint", _REGION),
    "301": ("the bucket is in another region, or at another endpoint", _REGION),
    "307": ("the bucket is in another region, or at another endpoint", _REGION),
    "401": ("the store does not accept the credentials", _KEYS),
    "403": ("the store does not accept the credentials", f"{_KEYS}; if they are, {_ALLOW}"),
    "MethodNotAllowed": ("the endpoint is not an S3 server", "correct AWS_ENDPOINT_URL_S3"),
    "405": ("the endpoint is not an S3 server", "correct AWS_ENDPOINT_URL_S3"),
    "NotImplemented": ("the endpoint does not know this S3 request", "correct AWS_ENDPOINT_URL_S3"),
    "501": ("the endpoint does not know this S3 request", "correct AWS_ENDPOINT_URL_S3"),
    "QuotaExceeded": ("the quota of the bucket is used up", "raise it, or free space"),
    "XMinioStorageFull": ("the store is full", "free space on it"),
}
"""Error codes of S3 -> the problem, and the remedy."""

_BOTOCORE: Mapping[str, tuple[str, str]] = {
    "NoCredentialsError": ("there are no S3 credentials in the environment of this process", _KEYS),
    "PartialCredentialsError": ("the S3 credentials are incomplete", _KEYS),
    "CredentialRetrievalError": ("the S3 credentials could not be fetched", "check the profile that provides them"),
    "ProfileNotFound": ("there is no such AWS profile", "correct AWS_PROFILE"),
    "SSOTokenLoadError": ("the AWS single sign-on has expired", "log in again: aws sso login"),
    "UnauthorizedSSOTokenError": ("the AWS single sign-on has expired", "log in again: aws sso login"),
    "TokenRetrievalError": ("the AWS single sign-on has expired", "log in again: aws sso login"),
    "NoRegionError": ("no region is known", _REGION),
    "InvalidRegionError": ("the region's name is invalid", "correct AWS_DEFAULT_REGION"),
    "ParamValidationError": ("this is not a valid S3 address", "correct the store's URL"),
    "SSLError": (
        "its certificate cannot be verified, or it does not speak TLS",
        "set AWS_CA_BUNDLE to the file of its certificate authority, or correct AWS_ENDPOINT_URL_S3",
    ),
}
"""Classes of botocore's errors -> the problem, and the remedy."""


_BROKEN = ("TLSV1_UNRECOGNIZED_NAME", "UNEXPECTED_EOF_WHILE_READING")
"""OpenSSL's reasons that, like alerts, are temporary."""
_OF_CERTIFICATES = ("CERTIFICATE", "UNKNOWN_CA")
"""Words in alerts by which the other side refuses our certificate."""


def _whose(path: str) -> str:
    import getpass

    try:
        return f"the user {getpass.getuser()}"
    except (KeyError, OSError):  # a container's user may have no name
        return f"the user {os.getuid()}"


def _full(path: str) -> str:
    import shutil

    place = Path(path).absolute()
    while not (place.exists() and place.is_mount()) and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return "the disk is full"
    return f"the disk is full ({free / 1e6:.1f} MB free on {place})"


_ERRNOS: Mapping[int, Callable[[str], tuple[str, str]]] = {
    errno.ENOSPC: lambda path: (_full(path), "free space there, or choose another folder"),
    errno.EDQUOT: lambda path: ("the disk quota is used up", "free space there, or ask for a higher quota"),
    errno.EROFS: lambda path: (
        "the file system is read-only",
        "choose another folder, or mount it writable",
    ),
    errno.EACCES: lambda path: (
        f"{_whose(path)} is not allowed to",
        "choose another folder, or change its permissions",
    ),
    errno.EPERM: lambda path: (f"{_whose(path)} is not allowed to", "choose another folder, or change its permissions"),
    errno.EMFILE: lambda path: ("this process has too many files open", "raise its limit: ulimit -n"),
    errno.ENFILE: lambda path: ("this machine has too many files open", "raise its limit: sysctl fs.file-max"),
    errno.EFBIG: lambda path: ("the file is larger than the file system or a limit allows", "raise it: ulimit -f"),
}
"""Error numbers of a local file system -> the problem, and the remedy."""


def refusal(error: BaseException, where: str, doing: Doing) -> StoreRefused | None:
    """An error that waiting can't fix, as a message for users; None for other errors.

    Args:
        where: the object or folder, as people know it.
        doing: the failed operation.
    """
    causes = chain(error)
    found = next((f for cause in causes if (f := _of_s3(cause))), None)
    found = found or next((f for cause in causes if (f := _of_a_disk(cause, where))), None)
    return StoreRefused(f"{where} cannot be {doing}: {found[0]}; {found[1]}") if found else None


@contextmanager
def explained(where: str | Path, doing: Doing = "written") -> Iterator[None]:
    """Turn a disk's error that waiting can't fix into one of fedpool's.

    Raises:
        StoreRefused: the disk is full or read-only, or this user may not use it.
    """
    try:
        yield
    except OSError as error:
        if (told := refusal(error, str(error.filename or where), doing)) is None:
            raise
        raise told from None


def _of_s3(error: BaseException) -> tuple[str, str] | None:
    if found := error_code(error):
        code, fields = found
        if code in _CODES:
            what, remedy = _CODES[code]
            known = f", {fields['Region']}" if fields.get("Region") else ""
            return f"{what} ({code})", remedy + (known if remedy is _REGION else "")
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("botocore")}
    if "SSLError" in kinds and not _is_final(error):
        return None
    for name in _BOTOCORE.keys() & kinds:
        return _BOTOCORE[name]
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return f"the endpoint is not a URL ({error})", "write AWS_ENDPOINT_URL_S3 as https://host:port"
    if "EndpointConnectionError" in kinds and (host := _unknown_host(error)):
        return f"there is no host {host}", "correct AWS_ENDPOINT_URL_S3"
    return None


def _is_final(error: Any) -> bool:
    """Whether a TLS connection would fail again: a bad certificate, or a server without TLS.

    Other alerts are temporary, such as those of a load balancer whose servers are starting. So are
    broken connections.
    """
    import ssl

    inner = error.kwargs.get("error")
    causes = [cause for one in chain(inner or error) for cause in (one, getattr(one, "os_error", None))]
    reason: str | None = next((found for cause in causes if (found := getattr(cause, "reason", None))), None)
    if reason is None or any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return True
    return not ("ALERT" in reason or reason in _BROKEN) or any(word in reason for word in _OF_CERTIFICATES)


def _unknown_host(error: Any) -> str | None:
    """The host of an endpoint, if it can't be resolved; otherwise None."""
    import socket

    inner = error.kwargs.get("error")
    while inner is not None:
        if isinstance(inner, socket.gaierror) and inner.errno in (
            socket.EAI_NONAME,
            getattr(socket, "EAI_NODATA", None),
        ):
            return str(error.kwargs.get("endpoint_url", "")).partition("://")[2].partition("/")[0]
        inner = getattr(inner, "os_error", None) or inner.__cause__
    return None


def _of_a_disk(error: BaseException, where: str) -> tuple[str, str] | None:
    import ssl

    if isinstance(error, ssl.SSLError):  # an OSError whose errno is an OpenSSL number
        return None
    if isinstance(error, OSError) and (explain := _ERRNOS.get(error.errno or 0)):
        return explain(str(error.filename or where))
    if isinstance(error, PermissionError):  # from a backend with its own errors
        return f"the store does not allow it ({error})", "check the credentials and their permissions"
    return None
