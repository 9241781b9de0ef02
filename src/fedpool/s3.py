"""What a store on S3 needs beside its address: settings that every S3 server understands, the
reason of a bare refusal.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROTOCOLS = ("s3", "s3a")

_CHECKSUMS = {
    "request_checksum_calculation": "AWS_REQUEST_CHECKSUM_CALCULATION",
    "response_checksum_validation": "AWS_RESPONSE_CHECKSUM_VALIDATION",
}
"""Settings of botocore, and their variables. By default it sends and compares checksums that
many servers do not know, or send of the whole object with a range of it. Every object here has
its sha256 in a manifest: they add nothing.
"""

_WITHOUT_REASON = ("301", "307", "400", "401", "403", "Forbidden", "Bad Request", "BadRequest")


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for s3fs with checksums only where S3 requires them, unless the options or the
    environment say otherwise.
    """
    config = dict(options.get("config_kwargs") or {})
    for setting, variable in _CHECKSUMS.items():
        if variable not in os.environ:
            config.setdefault(setting, "when_required")
    return {**options, "config_kwargs": config} if config else dict(options)


def error_code(error: BaseException) -> tuple[str, Mapping[str, Any]] | None:
    """Code and fields of what an S3 server has answered; None when it is not the answer of one."""
    response = getattr(error, "response", None)
    fields = response.get("Error") if isinstance(response, Mapping) else None
    return (str(fields.get("Code", "")), fields) if isinstance(fields, Mapping) else None


def put_new(file_system: Any, local: Path, target: str, *, conditional: bool) -> bool:
    """Write an object; where the server has conditional writes, only if there is none.

    Args:
        file_system: of fsspec; of S3 if conditional.
        conditional: ask the server for it. Many that do not know of it write all the same.

    Returns: whether to ask it the next time.

    Raises:
        FileExistsError: the server says that there is one.
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
    """The error itself or, where it came without a reason because the request was a HEAD, that
    of a request which gets one.
    """
    code = next((found[0] for cause in chain(error) if (found := error_code(cause))), None)
    if code not in _WITHOUT_REASON:
        return error
    try:
        file_system.call_s3("list_objects_v2", Bucket=root.partition("/")[0], MaxKeys=1)
    except Exception as reason:  # noqa: BLE001  # each backend has errors of its own, and this one is the answer
        return reason
    return error


def chain(error: BaseException) -> list[BaseException]:
    """An error, and what it came of."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found
