"""Memory that many forks share."""

import mmap
import subprocess
import sys

from fedpool.sites.huge_pages import collapse

SIZE = 8 << 20

SCRIPT = """
import os
from fedpool.sites.huge_pages import collapse

kept = [bytes([number % 256]) * 4000 for number in range(10_000)]
collapse()
assert all(part == bytes([number % 256]) * 4000 for number, part in enumerate(kept))
pid = os.fork()
if pid == 0:
    kept[0] = b"changed in the child"
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert kept[0] == bytes(4000)
print("unchanged")
"""


def test_memory_holds_the_same_after_it_was_collapsed() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ended.stdout == "unchanged\n"


def test_collapse_leaves_shared_mappings_alone_and_says_how_much_it_did() -> None:
    with mmap.mmap(-1, SIZE) as shared:
        shared[:SIZE] = b"x" * SIZE
        assert collapse() >= 0
        assert shared[:SIZE] == b"x" * SIZE
