"""Permission to run code that a job brought: refused, unless the user allowed the code's hash."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedpool.errors import ConfigError

VARIABLE = "FEDPOOL_ALLOWED_CODE"
ANY = "any"
_NONE = "none"
_MAX_SHOWN = 20
"""The most files that a message names."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Request:
    """A request to run the code of a job.

    Attributes:
        job_id: the job.
        wanted: the class of its recipe, `module:Class`.
        modules: the modules to import.
        files: the files of the code.
        sha256: the hash of the code.
        path: the zip that contains it.
    """

    job_id: str
    wanted: str
    modules: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str
    path: str

    def __str__(self) -> str:
        more = f" and {len(self.files) - _MAX_SHOWN} more" if len(self.files) > _MAX_SHOWN else ""
        what = f"{self.wanted} ({', '.join(self.files[:_MAX_SHOWN])}{more})"
        # The job's author chose these names. They must not move the cursor of a terminal.
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in what)
        return f"job {self.job_id} brings code for {shown}, sha256 {self.sha256}, in {self.path}"


Permission = Callable[[Request], None]
"""Raises a `ConfigError` to refuse."""


def is_allowed(sha256: str) -> bool:
    """Whether this process's `FEDPOOL_ALLOWED_CODE` allows the code.

    Raises:
        ConfigError: the variable's value is invalid.
    """
    return allows(os.environ.get(VARIABLE, ""), sha256, what=VARIABLE)


def allows(value: str, sha256: str, *, what: str) -> bool:
    """Whether a setting allows the code: its value is comma-separated hashes, `any` or `none`.

    Args:
        what: the setting's name, for the message.

    Raises:
        ConfigError: the value is invalid.
    """
    if (value := value.strip()) in ("", _NONE):
        return False
    return value == ANY or sha256 in check_hashes(what, value.split(","), or_else=f", {ANY!r} or {_NONE!r}")


def check_hashes(what: str, values: Sequence[str], *, or_else: str = "") -> frozenset[str]:
    """The hashes of the code that may run.

    Args:
        what: the variable or option that they come from, for the message.
        or_else: the other permitted values, for the message.

    Raises:
        ConfigError: a value isn't a sha256.
    """
    hashes = frozenset(value.strip() for value in values)
    for value in sorted(hashes):
        if not _SHA256.fullmatch(value):
            raise ConfigError(f"{what} has {value!r}: give sha256 hashes of 64 hex digits{or_else}")
    return hashes


def by_environment(request: Request) -> None:
    """Allow the code that `FEDPOOL_ALLOWED_CODE` names.

    Raises:
        ConfigError: the variable doesn't allow this code, or its value is invalid.
    """
    if not is_allowed(request.sha256):
        raise ConfigError(
            f"{request}. It is not allowed to run here: review it, then set {VARIABLE}={request.sha256} in the environment of "
            "this process (for a deployment's jobs: of the coordinator's worker)"
        )
