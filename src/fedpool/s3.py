"""S3 settings that every S3 server understands, and the reasons for bare refusals."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROTOCOLS = ("s3", "s3a")

_NAMES = 2
"""Number of names to list: the first of those that begin with a name is the name itself."""

_CHECKSUMS = {
    "request_checksum_calculation": "AWS_REQUEST_CHECKSUM_CALCULATION",
    "response_checksum_validation": "AWS_RESPONSE_CHECKSUM_VALIDATION",
}
"""botocore's settings and their variables.

By default botocore sends checksums, and compares those that it gets. Many servers don't know them,
or send the checksum of the whole object with a range of it. They add nothing here, because every
object has its sha256 in a manifest.
"""

_WITHOUT_REASON = ("301", "307", "400", "401", "403", "Forbidden", "Bad Request", "BadRequest")


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for s3fs: by default, checksums only if S3 requires them."""
    config = dict(options.get("config_kwargs") or {})
    for setting, variable in _CHECKSUMS.items():
        if variable not in os.environ:
            config.setdefault(setting, "when_required")
    return {**options, "config_kwargs": config} if config else dict(options)


def error_code(error: BaseException) -> tuple[str, Mapping[str, Any]] | None:
    """Code and fields of an S3 server's error response; None for other errors."""
    response = getattr(error, "response", None)
    fields = response.get("Error") if isinstance(response, Mapping) else None
    return (str(fields.get("Code", "")), fields) if isinstance(fields, Mapping) else None


def is_there(file_system: Any, target: str) -> bool:
    """Whether there is an object, by listing its name: one request, whatever the answer.

    With a HEAD request, S3 answers "forbidden" for a missing object, unless one may list the whole
    bucket. Listing a name only needs permission to list that name.
    """
    bucket, key, _ = file_system.split_path(target)
    try:
        found = file_system.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, Delimiter="/", MaxKeys=_NAMES)
    except FileNotFoundError:  # there is no such bucket
        return False
    return any(entry["Key"] == key for entry in found.get("Contents", ()))


def put_new(file_system: Any, local: Path, target: str, *, conditional: bool) -> bool:
    """Write an object. If the server has conditional writes, write it only if there is none yet.

    Args:
        file_system: an fsspec file system; S3 if conditional.
        conditional: request a conditional write. Many servers ignore the condition and write
            anyway.

    Returns: whether to request it again next time.

    Raises:
        FileExistsError: the server says that the object exists.
    """
    if conditional:
        try:
            file_system.put_file(str(local), target, mode="create")
        except FileExistsError:
            raise
        except Exception as error:
            codes = {found[0] for cause in chain(error) if (found := error_code(cause))}
            if codes & {"PreconditionFailed", "412"}:
                raise FileExistsError(target) from error
            if not codes & {"NotImplemented", "501"}:
                raise
        else:
            return True
    file_system.put_file(str(local), target)
    return False


def with_reason(error: BaseException, file_system: Any, root: str) -> BaseException:
    """The error, or that of another request if this one has no reason because it was a HEAD."""
    code = next((found[0] for cause in chain(error) if (found := error_code(cause))), None)
    if code not in _WITHOUT_REASON:
        return error
    try:
        file_system.call_s3("list_objects_v2", Bucket=root.partition("/")[0], MaxKeys=1)
    except Exception as reason:  # noqa: BLE001  # backends have their own errors, and this one has the reason
        return reason
    return error


def chain(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found
