"""The command line of bubblewrap for a client script: an empty root, and what is put into it.

A script gets the system's programs and libraries, Python and its packages, the devices, its job's
folders and what the operator lists. It has its own processes, users, host name, System V IPC and,
unless it is allowed the network, only a loopback device. It has no capabilities.
"""

import site
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt/cuda", "/nix/store", "/gnu/store")
_ETC = (
    "alternatives",
    "group",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "passwd",
    "timezone",
    "OpenCL",
)
_ETC_OF_NETWORK = ("ca-certificates", "gai.conf", "host.conf", "pki", "protocols", "resolv.conf", "services", "ssl")
_DEVICES = ("nvidia*", "dri", "kfd", "accel")
"""Accelerators, in /dev. Which of them a script uses, the site's `gpus` says."""
_DEVICES_OF_NETWORK = ("infiniband",)
"""They reach other machines, whatever the script's network namespace has."""


def bubblewrap(
    program: str, *, read: Iterable[Path], write: Iterable[Path], temporary: Path | None, network: bool
) -> list[str]:
    """The words to put before a command.

    Args:
        program: bubblewrap.
        read: what the command may read, besides the system and Python.
        write: what it may write.
        temporary: the folder that it sees as /tmp; None: one in memory.
        network: whether it may use the network.
    """
    words = [program, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "site"]
    if network:
        words.append("--share-net")
    words += ["--proc", "/proc", "--dev", "/dev"]
    words += ["--tmpfs", "/tmp"] if temporary is None else ["--bind", str(temporary), "/tmp"]
    words += ["--setenv", "TMPDIR", "/tmp"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += _bind("--ro-bind", path)
    for name in _ETC + (_ETC_OF_NETWORK if network else ()):
        if (path := Path("/etc") / name).exists():
            words += _bind("--ro-bind", path)
    patterns = _DEVICES + (_DEVICES_OF_NETWORK if network else ())
    devices = [device for pattern in patterns for device in sorted(Path("/dev").glob(pattern))]
    for device in devices:
        words += _bind("--dev-bind", device)
    words += _bind("--ro-bind", Path("/sys" if devices else "/sys/devices/system"))
    for path in _outermost([*python_folders(), *read]):
        words += _bind("--ro-bind", path)
    for path in write:
        words += _bind("--bind", path)
    return [*words, "--remount-ro", "/", "--"]


def python_folders() -> list[Path]:
    """Where this Python and the packages that it can import are."""
    package = Path(str(sys.modules["fedpool"].__file__)).parent
    found = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)]
    found += map(Path, (*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])))
    found += _on_the_path()
    # In a checkout, the package's folders are links to others.
    found += [package, *(each.resolve() for each in package.iterdir() if each.is_symlink())]
    found += [path.resolve() for path in found]
    return [path for path in dict.fromkeys(found) if path.exists()]


def _on_the_path() -> Iterator[Path]:
    """What is on `sys.path` beyond Python's own folders: editable packages and `PYTHONPATH`.

    The current folder is there for `python -m`. It has no packages that a script needs, but it may
    have the site's settings.
    """
    for entry in filter(None, sys.path):
        path = Path(entry).absolute()
        if path != Path.cwd() and path not in (Path("/"), Path.home()):
            yield path


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """The paths that are not below another, in order, parents first."""
    unique = sorted(dict.fromkeys(path.absolute() for path in paths), key=lambda path: len(path.parts))
    kept: list[Path] = []
    for path in unique:
        inside_system = any(path.is_relative_to(system) for system in _SYSTEM)
        if not inside_system and not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _bind(how: str, path: Path) -> list[str]:
    """A mount at its own path; of a link, what it points to."""
    return [how, str(path.resolve()), str(path)]
