"""Locks and exclusive moves on file systems that lack the calls, such as FUSE and NFS: in real
processes whose libc reports the calls as missing.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# Fails the calls that MISSING names; everything else goes to the real libc.
_LIBRARY = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
static int missing(const char *name) {
    const char *all = getenv("MISSING");
    const char *number = getenv("MISSING_ERRNO");
    if (!all || !strstr(all, name)) return 0;
    errno = atoi(number);
    return 1;
}
#include <dlfcn.h>
#include <sys/types.h>
int link(const char *a, const char *b) {
    if (missing("link")) return -1;
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "link"))(a, b);
}
int flock(int fd, int how) {
    if (missing("flock")) return -1;
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, how);
}
int fdatasync(int fd) {
    if (missing("fdatasync")) return -1;
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
int renameat2(int a, const char *b, int c, const char *d, unsigned int flags) {
    if (missing("renameat2")) return -1;
    return ((int (*)(int, const char *, int, const char *, unsigned int))dlsym(RTLD_NEXT, "renameat2"))(a, b, c, d, flags);
}
"""

_USE = """
    import sys
    from pathlib import Path

    from fedpool import StoreError
    from fedpool.sites.scratch import Scratch
    from fedpool.store import Store

    folder = Path(sys.argv[1])
    store = Store(folder)
    with store.held("job"):
        store.write_json("job/round.json", {"first": True})
        try:
            store.write_json("job/round.json", {"second": True})
        except StoreError as error:
            print(error)
        store.write_bytes("job/large", bytes(17 << 20))
        store.settle("job/large")
    with store.held("job"):
        print(store.read_json("job/round.json"))
    scratch, other = Scratch(folder / "sites", ".fedpool-"), Scratch(folder / "sites", ".fedpool-")
    assert scratch.path.is_dir() and other.path.is_dir()
    scratch.remove()
    other.remove()
    print(sorted(path.name for path in folder.rglob("*")))
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs a script in a process in which some calls fail with an errno."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler: apt-get install gcc")
    folder = tmp_path_factory.mktemp("missing")
    (folder / "missing.c").write_text(_LIBRARY)
    library = folder / "missing.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "missing.c", "-ldl"], check=True)

    def run(script: str, *arguments: str, missing: str, number: int) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "LD_PRELOAD": str(library), "MISSING": missing, "MISSING_ERRNO": str(number)}
        command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "EPERM", "ENOLCK"])
@pytest.mark.parametrize(
    "missing", ["flock link fdatasync", "flock link fdatasync renameat2"], ids=["rename", "nothing"]
)
def test_a_store_works_exclusively_where_calls_are_missing_and_says_so_once(
    without: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path, missing: str, name: str
) -> None:
    import errno

    done = without(_USE, str(tmp_path), missing=missing, number=getattr(errno, name))
    assert done.returncode == 0, done.stderr
    refused, read, there = done.stdout.splitlines()
    assert "round.json exists already" in refused and read == "{'first': True}"
    assert there == "['job', 'large', 'round.json', 'sites']"
    lines = done.stderr.splitlines()
    assert len([line for line in lines if "has no locks" in line and "/job" in line]) == 1, lines
    assert len([line for line in lines if "has no hard links" in line]) == 1, lines
    assert len([line for line in lines if "no rename that does not overwrite" in line]) == ("renameat2" in missing)
    assert len([line for line in lines if "cannot be synced" in line]) == 1, lines


@pytest.mark.parametrize("missing", ["link", "link renameat2"])
def test_of_many_processes_exactly_one_writes_where_there_are_no_hard_links(
    without: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path, missing: str
) -> None:
    import errno
    from concurrent.futures import ThreadPoolExecutor

    script = """
        import sys
        from fedpool import StoreError
        from fedpool.store import Store

        won = 0
        for number in range(20):
            try:
                Store(sys.argv[1]).write_bytes(f"job/{number}", sys.argv[2].encode() * 10_000)
                won += 1
            except StoreError as error:
                assert "exists already" in str(error)
        print(won)
    """
    with ThreadPoolExecutor(4) as threads:
        calls = [
            threads.submit(without, script, str(tmp_path), letter, missing=missing, number=errno.ENOSYS)
            for letter in "abcd"
        ]
    done = [call.result() for call in calls]
    assert [process.returncode for process in done] == [0, 0, 0, 0], done
    assert sum(int(process.stdout) for process in done) == 20
    for number in range(20):
        data = (tmp_path / "job" / str(number)).read_bytes()
        assert len(data) == 10_000 and len(set(data)) == 1
