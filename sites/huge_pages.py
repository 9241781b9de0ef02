"""Huge pages for a process that forks many children: a fork copies the table of pages, and its end
takes that apart again.

With pages of 4 KiB both are proportional to the memory that the parent has written to: 18 ms for
the 270 MB that torch and scikit-learn come to, against 4 ms with pages of 2 MiB. Linux 6.1 can turn
the one into the other in place.
"""

import ctypes
from pathlib import Path

_MADV_COLLAPSE = 25
_HUGE = 2 << 20
_MAPS = Path("/proc/self/maps")


def collapse() -> int:
    """Ask the kernel to back this process's own memory with huge pages, as far as it has them; an
    older kernel has none.

    Does not change what the memory holds, nor who may write to it. Costs some .3 ms a MB, once.

    Returns: bytes in the mappings for which the kernel did all that was asked; 0 where it cannot.
    """
    if not _MAPS.exists():
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done = 0
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        anonymous = inode == "0" and (not name or name[0] == "[heap]")
        if permissions != "rw-p" or not anonymous:
            continue
        start, stop = (int(address, 16) for address in addresses.split("-"))
        start, stop = -(-start // _HUGE) * _HUGE, stop // _HUGE * _HUGE
        if start < stop and madvise(start, stop - start, _MADV_COLLAPSE) == 0:
            done += stop - start
    return done
