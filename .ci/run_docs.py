"""Runs what README.md and the pages of docs/ tell a reader to run: every `sh` block's commands,
every `python` block.

A `python` block that begins with a comment such as `# client.py` is a file: it is written to a
folder of its own page, where the page's later blocks find it; `# job.py` is run. A page's commands
share their variables, as in one shell. A command is skipped only when it is in RAN_ELSEWHERE.
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
    "make docs": "this very script",
    "make catalogue": "a test holds that it would change nothing",
    "make wheel": "a step of .ci/run",
    "make pythons": "a step of .ci/run",
    "make lock": "changes constraints.txt",
    "make examples": "a step of .ci/run",
    "make bench": "minutes long; run by hand before figures are quoted",
    "make bench-setup": "installs all anew; run by hand before figures are quoted",
    "make bench-poc": "ten minutes; run by hand before figures are quoted",
    "make bench-peers": "minutes long, and installs other frameworks; run by hand before figures are quoted",
    "make oracle": "hours; its output is docs/fidelity.md",
    "make test-slow": "minutes long",
    "make test-gpu": "needs a CUDA device",
    "make chaos": "an hour or two; its output is in docs/reliability.md",
    "make poc-demo": "a step of .ci/run",
    ".ci/run": "what runs this script",
}
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_page(page: Path) -> int:
    """Run the blocks of a page in order; returns how many commands and files were run."""
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
    """Run a command of a page as its reader would, after those before it; returns the variables
    that it leaves.
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
