"""Starting a process as another user of this machine."""

import os
import pwd
from typing import TypedDict


class User(TypedDict, total=False):
    """Arguments of `subprocess.Popen`."""

    user: int
    group: int
    extra_groups: list[int]


def as_user(name: str | None) -> User:
    """The arguments with which `subprocess` starts a process as a user, in the user's own groups.

    Empty for None and for this process's own user.

    Raises:
        KeyError: the user does not exist.
    """
    if name is None or (entry := pwd.getpwnam(name)).pw_uid == os.geteuid():
        return {}
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": os.getgrouplist(name, entry.pw_gid)}
