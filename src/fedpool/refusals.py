"""Why a store or a disk refuses, in one sentence: what, where, and the remedy. Only what waiting
does not heal is here.

Client scripts import this: what few errors need is imported where they are told.
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

_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or storage_options) to valid keys, and start this process again"
)
_REGION = "set AWS_DEFAULT_REGION to the region of the bucket"
_ALLOW = "allow it in the policy of these credentials"

_CODES: Mapping[str, tuple[str, str]] = {
    "InvalidAccessKeyId": ("the store does not know the access key", _KEYS),
    "InvalidClientTokenId": ("the store does not know the access key", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", _KEYS),
    "ExpiredToken": (
        "the credentials have expired",
        "get new ones (AWS_SESSION_TOKEN and the keys with it), and start this process again",
    ),
    "TokenRefreshRequired": ("the credentials have expired", "get new ones, and start this process again"),
    "InvalidToken": ("the store does not accept AWS_SESSION_TOKEN", "unset it, or get new credentials"),
    "RequestTimeTooSkewed": (
        "the clock of this machine and that of the store differ too much",
        "set the clock of this machine",
    ),
    "NoSuchBucket": ("there is no such bucket", "create it, or correct the store's URL"),
    "InvalidBucketName": ("this cannot be the name of a bucket", "correct the store's URL"),
    "AccessDenied": ("the credentials are valid but do not allow it", _ALLOW),
    "AllAccessDisabled": ("all access to the bucket is disabled", "ask its owner"),
    "AccountProblem": ("there is a problem with the account that owns the bucket", "ask its owner"),
    "AuthorizationHeaderMalformed": ("the region is not that of the bucket", _REGION),
    "IllegalLocationConstraintException": ("the region is not that of the bucket", _REGION),
    "PermanentRedirect": ("the bucket is in another region, or at another endpoint", _REGION),
    "301": ("the bucket is in another region, or at another endpoint", _REGION),
    "307": ("the bucket is in another region, or at another endpoint", _REGION),
    "401": ("the store does not accept the credentials", _KEYS),
    "403": ("the store does not accept the credentials", f"{_KEYS}; if they are, {_ALLOW}"),
    "MethodNotAllowed": ("what answers is not an S3 server", "correct AWS_ENDPOINT_URL_S3"),
    "405": ("what answers is not an S3 server", "correct AWS_ENDPOINT_URL_S3"),
    "NotImplemented": ("what answers does not know this request of S3", "correct AWS_ENDPOINT_URL_S3"),
    "501": ("what answers does not know this request of S3", "correct AWS_ENDPOINT_URL_S3"),
    "QuotaExceeded": ("the quota of the bucket is used up", "raise it, or free space"),
    "XMinioStorageFull": ("the store is full", "free space on it"),
}
"""Error codes of S3 -> what is wrong, and the remedy."""

_BOTOCORE: Mapping[str, tuple[str, str]] = {
    "NoCredentialsError": ("there are no S3 credentials in the environment of this process", _KEYS),
    "PartialCredentialsError": ("the S3 credentials are not complete", _KEYS),
    "CredentialRetrievalError": ("the S3 credentials could not be fetched", "check the profile that they come from"),
    "ProfileNotFound": ("there is no such profile of AWS", "correct AWS_PROFILE"),
    "SSOTokenLoadError": ("the single sign-on of AWS has expired", "log in again: aws sso login"),
    "UnauthorizedSSOTokenError": ("the single sign-on of AWS has expired", "log in again: aws sso login"),
    "TokenRetrievalError": ("the single sign-on of AWS has expired", "log in again: aws sso login"),
    "NoRegionError": ("no region is known", _REGION),
    "InvalidRegionError": ("this cannot be the name of a region", "correct AWS_DEFAULT_REGION"),
    "ParamValidationError": ("this cannot be an address in S3", "correct the store's URL"),
    "SSLError": (
        "its certificate cannot be verified, or it does not speak TLS",
        "name the file of its authority in AWS_CA_BUNDLE, or correct AWS_ENDPOINT_URL_S3",
    ),
}
"""Classes of botocore's errors -> what is wrong, and the remedy."""


_BROKEN = ("TLSV1_UNRECOGNIZED_NAME", "UNEXPECTED_EOF_WHILE_READING")
"""Reasons of OpenSSL that, like alerts, tell of the moment."""
_OF_CERTIFICATES = ("CERTIFICATE", "UNKNOWN_CA")
"""Words in the alerts with which the other side refuses a certificate of ours."""


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
    errno.EDQUOT: lambda path: ("the disk quota is used up", "free space there, or have the quota raised"),
    errno.EROFS: lambda path: (
        "the file system is read-only",
        "choose another folder, or mount it so that it can be written to",
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
"""Numbers of a local file system's errors -> what is wrong, and the remedy."""


def refusal(error: BaseException, where: str, doing: Doing) -> StoreRefused | None:
    """What to tell a user of an error that waiting does not heal; None for any other.

    Args:
        where: the object or folder, as a person knows it.
        doing: what was tried with it.
    """
    causes = chain(error)
    found = next((f for cause in causes if (f := _of_s3(cause))), None)
    found = found or next((f for cause in causes if (f := _of_a_disk(cause, where))), None)
    return StoreRefused(f"{where} cannot be {doing}: {found[0]}; {found[1]}") if found else None


@contextmanager
def explained(where: str | Path, doing: Doing = "written") -> Iterator[None]:
    """Make an error of a disk that waiting does not heal one of ours.

    Raises:
        StoreRefused: the disk is full, read-only, or not ours to use.
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
    """Whether a connection by TLS will fail again: one of the certificates is no good, or the other
    side does not speak TLS.

    Other alerts tell of the moment, as a load balancer's do while what is behind it starts; so does
    a connection that breaks.
    """
    import ssl

    inner = error.kwargs.get("error")
    causes = [cause for one in chain(inner or error) for cause in (one, getattr(one, "os_error", None))]
    reason: str | None = next((found for cause in causes if (found := getattr(cause, "reason", None))), None)
    if reason is None or any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return True
    return not ("ALERT" in reason or reason in _BROKEN) or any(word in reason for word in _OF_CERTIFICATES)


def _unknown_host(error: Any) -> str | None:
    """The host of an endpoint that has no address; None when it could be reached, or nobody can
    tell.
    """
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

    if isinstance(error, ssl.SSLError):  # an OSError, whose errno is a number of OpenSSL's
        return None
    if isinstance(error, OSError) and (explain := _ERRNOS.get(error.errno or 0)):
        return explain(str(error.filename or where))
    if isinstance(error, PermissionError):  # of a backend with errors of its own
        return f"the store does not allow it ({error})", "check the credentials, and what they allow"
    return None
