"""Who may run the code that came with a job: nobody, unless whoever runs this process has said
so, by the code's hash.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedpool.errors import ConfigError

VARIABLE = "FEDPOOL_ALLOWED_CODE"
ANY = "any"
_NONE = "none"
_MAX_SHOWN = 20
"""Files of the code that a message names."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for before the code of a job is run.

    Attributes:
        job_id: of the job.
        wanted: the class of its recipe, `module:Class`.
        modules: that would be imported.
        files: that the code consists of.
        sha256: of the code.
        path: where it lies, a zip.
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
        # Whoever wrote the job chose the names: they are not to move the cursor of a terminal.
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in what)
        return f"job {self.job_id} brings code for {shown}, sha256 {self.sha256}, in {self.path}"


Permission = Callable[[Request], None]
"""Refuses with a `ConfigError`."""


def is_allowed(sha256: str) -> bool:
    """Whether `FEDPOOL_ALLOWED_CODE` of this process allows code.

    Raises:
        ConfigError: its value is not one.
    """
    return allows(os.environ.get(VARIABLE, ""), sha256, what=VARIABLE)


def allows(value: str, sha256: str, *, what: str) -> bool:
    """Whether a setting allows code: it has hashes with commas between them, `any`, or `none`.

    Args:
        what: the setting, for the message.

    Raises:
        ConfigError: its value is not one.
    """
    if (value := value.strip()) in ("", _NONE):
        return False
    return value == ANY or sha256 in check_hashes(what, value.split(","), or_else=f", {ANY!r} or {_NONE!r}")


def check_hashes(what: str, values: Sequence[str], *, or_else: str = "") -> frozenset[str]:
    """The hashes of code that may be run.

    Args:
        what: the variable or the option that has them, for the message.
        or_else: what else it may be.

    Raises:
        ConfigError: one is not a sha256.
    """
    hashes = frozenset(value.strip() for value in values)
    for value in sorted(hashes):
        if not _SHA256.fullmatch(value):
            raise ConfigError(f"{what} has {value!r}: give sha256 hashes of 64 hex digits{or_else}")
    return hashes


def by_environment(request: Request) -> None:
    """Allow what `FEDPOOL_ALLOWED_CODE` says.

    Raises:
        ConfigError: it does not allow this code, or its value is not one.
    """
    if not is_allowed(request.sha256):
        raise ConfigError(
            f"{request}. It is not allowed to run here: review it, then set {VARIABLE}={request.sha256} in the environment of "
            "this process; for the jobs of a deployment, in that of the coordinator's worker"
        )
