"""Shared by the tests of custom algorithms and filters: those of CONTRIBUTING.md, in a folder with
a job.py.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def write_algorithm(folder: Path) -> Path:
    """Write the files of CONTRIBUTING.md's algorithm: client.py, partial_step.py and job.py."""
    return _write(folder, _files("Add an algorithm"), {"client.py", "partial_step.py", "job.py"})


def write_filter(folder: Path) -> Path:
    """Write the files of CONTRIBUTING.md's filter: scaling.py and job.py; client.py is the
    algorithm's.
    """
    client = {"client.py": _files("Add an algorithm")["client.py"]}
    return _write(folder, client | _files("Add a filter"), {"client.py", "scaling.py", "job.py"})


def _files(section: str) -> dict[str, str]:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(_BLOCK.findall(page.partition(f"## {section}")[2].partition("\n## ")[0]))


def _write(folder: Path, files: dict[str, str], expected: set[str]) -> Path:
    assert set(files) == expected
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in a folder, with stdout and stderr in one stream."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDPOOL_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )


@contextmanager
def importable(folder: Path) -> Iterator[Path]:
    """Put a user's folder on sys.path, as for a job.py in it; afterwards forget its modules."""
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        forget(folder)


@contextmanager
def job_code_forgotten() -> Iterator[None]:
    """Remove the job code that is loaded in the block from this process: other tests have modules
    of the same names.
    """
    modules, path = set(sys.modules), list(sys.path)
    try:
        yield
    finally:
        for name in set(sys.modules) - modules:
            if "fedpool-code-" in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        sys.path[:] = path


def forget(folder: Path) -> None:
    """Forget a folder's modules in this process, so that others of their names can be imported."""
    for name, module in list(sys.modules.items()):
        known = getattr(module, "__dict__", {})
        places = [known.get("__file__") or "", *known.get("__path__", ())]
        if any(str(place).startswith(str(folder)) for place in places):
            del sys.modules[name]
