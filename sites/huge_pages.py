"""Huge pages for a process that forks many children.

A fork copies the page table, and the child's end frees it again. With pages of 4 KiB both take time
proportional to the memory that the parent has written: 18 ms for the 270 MB of torch and
scikit-learn, against 4 ms with pages of 2 MiB. Linux 6.1 can convert pages in place.
"""

import ctypes
from pathlib import Path

_MADV_COLLAPSE = 25
_HUGE = 2 << 20
_MAPS = Path("/proc/self/maps")


def collapse() -> int:
    """Ask the kernel to back this process's private memory with huge pages where it can.

    Neither the contents nor the permissions of the memory change. Takes about .3 ms per MB, once.

    Returns: bytes of the mappings that the kernel converted completely; 0 if it cannot (older
    kernels, other systems).
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
