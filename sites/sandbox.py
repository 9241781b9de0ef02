"""How a site runs client scripts, which come from outside: `[sandbox]` in its settings.

`bubblewrap` gives a script namespaces of its own: it sees the files that it needs, read-only, its
job's folders and itself. `user` runs it as another user of the machine. `none` runs it as the
worker's user, for sites whose worker is itself in a container or on a scientist's own machine.
"""

import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedpool.errors import ConfigError
from fedpool.sites.bubblewrap import bubblewrap
from fedpool.sites.job_folders import JobFolders
from fedpool.sites.other_user import as_user

PROGRAM = "bwrap"

_INSTALL = "install bubblewrap (apt-get install bubblewrap, dnf install bubblewrap)"
_OR_ELSE = (
    "or choose another [sandbox] in the site's settings: bubblewrap, user, or none, which lets scripts read what the worker "
    "may read"
)
_TRIAL = "import fedpool.sites.script"

Sandboxing = Literal["bubblewrap", "none"]
"""What a command's option can choose; another user needs a name, which the site's settings give."""
WITHOUT: Final = {"run": "none", "network": True, "read": (), "user": None}
"""The settings of no sandbox, which replace others."""

_DENIED = re.compile(
    r"(FileNotFoundError|PermissionError|Read-only file system|gaierror|Name or service not known|name resolution"
    r"|Network is unreachable|ConnectionError|MaxRetryError|Cannot allocate memory|MemoryError)"
)


class Sandbox(BaseModel):
    """What client scripts may reach at a site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Literal["bubblewrap", "user", "none"] = Field(
        default="bubblewrap",
        description="bubblewrap: in namespaces of its own; user: as another user; none: as the worker's user",
    )
    user: str | None = Field(
        default=None, description='user that scripts run as, with run = "user"; the worker must be root'
    )
    network: bool = Field(default=False, description="whether scripts may use the network")
    read: tuple[Path, ...] = Field(
        default=(), description="files and folders that scripts may read, such as the site's data"
    )
    max_memory_gb: float | None = Field(
        default=None,
        description="memory that a process of a script may allocate, in 10^9 bytes; default: no limit",
        gt=0,
    )
    max_processes: int | None = Field(
        default=None, description="processes and threads that the scripts' user may have; default: no limit", ge=1
    )
    max_round_s: float | None = Field(
        default=None, description="seconds that a script may take for a round; default: no limit", gt=0
    )

    @model_validator(mode="after")
    def _fits(self) -> "Sandbox":
        if self.run == "user" and self.user is None:
            raise ValueError(
                'run = "user" needs the name of the user that scripts run as: add user = "fedpool-scripts"'
            )
        if self.run != "user" and self.user is not None:
            raise ValueError(f'user = {self.user!r} needs run = "user": with run = "{self.run}", leave user out')
        if self.run != "bubblewrap" and not self.network:
            raise ValueError(
                f'run = "{self.run}" cannot keep scripts from the network: say so with network = true, or set run = "bubblewrap"'
            )
        if self.run != "bubblewrap" and self.read:
            raise ValueError(
                f'run = "{self.run}" cannot limit what scripts read: leave read out, or set run = "bubblewrap"'
            )
        for path in self.read:
            if not path.is_absolute():
                raise ValueError(f"read: {str(path)!r} is not an absolute path: write the whole path")
        return self

    @property
    def is_apart(self) -> bool:
        """Whether scripts may be unable to read what the worker can, such as a local store."""
        return self.run != "none"

    @property
    def limits(self) -> dict[str, int]:
        """Resource limits of a script's processes: names of `resource` without `RLIMIT_`."""
        found = {"CORE": 0}  # a core dump would have the site's data
        if self.max_memory_gb is not None:
            # Not RLIMIT_AS: CUDA reserves far more addresses than it uses.
            found["DATA"] = int(self.max_memory_gb * 1e9)
        if self.max_processes is not None:
            found["NPROC"] = self.max_processes
        return found

    def command(self, folders: JobFolders, sockets: Path) -> list[str]:
        """What to put before a script's command so that it runs in the sandbox.

        Args:
            sockets: the folder of the session's socket.
        """
        if self.run != "bubblewrap":
            return []
        return bubblewrap(
            PROGRAM,
            read=[*self.read, folders.bundle, folders.models],
            write=[folders.work, folders.outbox, folders.kept, sockets],
            temporary=folders.temporary,
            network=self.network,
        )

    def give(self, folders: JobFolders, sockets: Path) -> None:
        """Let the scripts' user reach a job's folders.

        Raises:
            OSError: the owner cannot be changed.
        """
        if self.user is None:
            return
        entry = pwd.getpwnam(self.user)
        for folder in (folders.work, folders.outbox, folders.kept, folders.temporary, sockets):
            shutil.chown(folder, entry.pw_uid, entry.pw_gid)
        for folder in (folders.scratch.parent, folders.scratch):
            folder.chmod(0o711)  # names inside are not listed

    def check(self) -> None:
        """Try the sandbox, before the site takes work.

        Raises:
            ConfigError: it does not work here; the message says why, and what to do.
        """
        if self.user is not None:
            self._check_user(self.user)
        for path in self.read:
            if not path.exists():
                raise ConfigError(f"[sandbox] read: {str(path)!r} does not exist: correct the path, or leave it out")
        self.check_program()
        if self.run == "none":
            return
        before = bubblewrap(PROGRAM, read=self.read, write=(), temporary=None, network=self.network)
        trial = [*(before if self.run == "bubblewrap" else []), sys.executable, "-P", "-c", _TRIAL]
        try:
            ran = subprocess.run(
                trial, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **as_user(self.user)
            )
        except OSError as error:
            said, failed = str(error), True
        else:
            said, failed = ran.stderr, ran.returncode != 0
        if failed:
            raise ConfigError(self._why_not(said))

    def check_program(self) -> None:
        """Check that the sandbox's program is installed.

        Raises:
            ConfigError: it isn't.
        """
        if self.run == "bubblewrap" and shutil.which(PROGRAM) is None:
            raise ConfigError(
                f"client scripts run in a sandbox, but {PROGRAM} is not on the worker's PATH: {_INSTALL}, {_OR_ELSE}"
            )

    def hint(self, cause: str) -> str | None:
        """A sentence on the sandbox, if it may be why a script failed.

        Args:
            cause: the failure, with the script's traceback.
        """
        if self.run != "bubblewrap" or not _DENIED.search(cause):
            return None
        network = "the network" if self.network else "no network"
        listed = ", ".join(map(str, self.read)) or "no further folders"
        return (
            f"the script ran in the site's sandbox: it has {network}, may write to its current folder and /tmp, and may read "
            f"{listed}. If it needs more, and you agree, set network or read in [sandbox] of the site's settings, and "
            "restart its worker"
        )

    def warnings(self) -> list[str]:
        """What an operator should know about these settings."""
        found = []
        if self.run == "none":
            found.append(
                'scripts run without a sandbox ([sandbox] run = "none"): they can read what this worker\'s user can read, '
                "and use the network"
            )
        if self.max_processes is not None and os.geteuid() == 0 and self.user is None:
            found.append("[sandbox] max_processes does not limit root: run the worker as another user")
        return found

    def _check_user(self, name: str) -> None:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(
                f"[sandbox] user = {name!r} is not a user of this machine: create it (useradd --system {name}), or correct "
                "the name"
            ) from None
        if os.geteuid() not in (0, entry.pw_uid):
            raise ConfigError(
                f"[sandbox] user = {name!r}: only root can run scripts as another user, and the worker is not root: leave user "
                'out, and use run = "bubblewrap"'
            )

    def _why_not(self, text: str) -> str:
        said = next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
        if self.run == "user":
            return (
                f"client scripts run as the user {self.user}, who cannot run Python here ({said}): install Python and fedpool "
                f"where this user can read them, {_OR_ELSE}"
            )
        if said.startswith(f"{PROGRAM}: execvp") or "ModuleNotFoundError" in text:
            remedy = "list the folders of Python and its packages in [sandbox] read"
        else:
            remedy = (
                "allow namespaces to all users (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu "
                "kernel.apparmor_restrict_unprivileged_userns=0; in a container, its engine forbids them)"
            )
        return f"client scripts run in a sandbox, but {PROGRAM} does not work here ({said}): {remedy}, {_OR_ELSE}"
