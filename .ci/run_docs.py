"""Runs the `sh` and `python` blocks of README.md, CONTRIBUTING.md and docs/, as a reader would.

A `python` block that starts with a comment such as `# client.py` is written to a file in the page's
folder, where the page's later blocks can use it; `# job.py` is also run. The commands of a page
share their variables, as in one shell. Only commands in RAN_ELSEWHERE are skipped.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAN_ELSEWHERE = {
    "make demo": "a step of .ci/run",
    "make test": "a step of .ci/run",
    "make lint": "a step of .ci/run",
    "make docs": "this script",
    "make catalogue": "a test checks that it would change nothing",
    "make wheel": "a step of .ci/run",
    "make pythons": "a step of .ci/run",
    "make lock": "changes constraints.txt",
    "make examples": "a step of .ci/run",
    "make bench": "minutes long; run by hand before figures are quoted",
    "make bench-setup": "installs everything again; run by hand before figures are quoted",
    "make bench-poc": "ten minutes; run by hand before figures are quoted",
    "make bench-peers": "minutes long, and installs other frameworks; run by hand before figures are quoted",
    "make bench-before": "installs another commit; run by hand before figures are quoted",
    "make oracle": "hours; its output is docs/fidelity.md",
    "make test-slow": "minutes long",
    "make test-gpu": "needs a CUDA device",
    "make chaos": "an hour or two; its output is in docs/reliability.md",
    "make poc-demo": "a step of .ci/run",
    ".ci/run": "runs this script",
}
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_page(page: Path) -> int:
    """Run the blocks of a page in order; returns the number of commands and files run."""
    count = 0
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        for language, text in _BLOCK.findall(page.read_text()):
            if language == "sh":
                for command in (
                    line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")
                ):
                    command = command.split("  #")[0].strip()
                    if command in RAN_ELSEWHERE:
                        continue
                    print(f"{page.name}: {command}", flush=True)
                    environment = _run(command, environment)
                    count += 1
                continue
            name = re.match(r"# (\w+\.py)", text)
            file = Path(folder) / (name[1] if name else "block.py")
            file.write_text(text)
            if name and name[1] != "job.py":
                compile(text, name[1], "exec")
                continue
            print(f"{page.name}: {file.name}", flush=True)
            subprocess.run([sys.executable, str(file)], check=True, cwd=folder)
            count += 1
    return count


def _run(command: str, environment: dict[str, str]) -> dict[str, str]:
    """Run a page's command in the environment that the commands before it left; returns the
    environment that it leaves.
    """
    with tempfile.NamedTemporaryFile() as left:
        subprocess.run(
            ["bash", "-c", f"{command}\nstatus=$?\nenv -0 > {left.name}\nexit $status"],
            check=True,
            cwd=ROOT,
            env=environment,
        )
        return dict(line.split("=", 1) for line in Path(left.name).read_text().split("\0") if line)


if __name__ == "__main__":
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    print(f"{sum(run_page(page) for page in pages)} commands and files of {len(pages)} pages ran")
