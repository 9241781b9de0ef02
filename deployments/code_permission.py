"""Permission for a command to run a job's code: an option, the environment, or a prompt."""

import sys

from fedpool.allowed_code import Permission, Request, check_hashes, is_allowed
from fedpool.errors import ConfigError


def permission(allowed: list[str] | None) -> Permission:
    """Permission to run a job's code in a command.

    Args:
        allowed: hashes of code that may run, from `--allow-code`.

    Raises:
        ConfigError: a value is not a hash.
    """
    hashes = check_hashes("--allow-code", allowed or [])

    def allow(request: Request) -> None:
        if request.sha256 in hashes or is_allowed(request.sha256):
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ConfigError(f"{request}. To run it here, review it and add --allow-code {request.sha256}")
        sys.stderr.write(f"{request}\nRun it here? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise ConfigError(f"the code of job {request.job_id} was not run")

    return allow
