"""`python -m fedpool.testing`: run a program, and kill it at a named point; see `kill_at`."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from fedpool.testing.killer import kill_at


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a Python file, or a module after `-m`, and kill it at a named point."""
    parser = argparse.ArgumentParser(
        prog="python -m fedpool.testing", description="Run a program and kill it at a named point."
    )
    parser.add_argument("--at", required=True, help="regular expression to search for in the paths of written objects")
    parser.add_argument("--when", choices=["before", "after"], default="before")
    parser.add_argument("--skip", type=int, default=0, help="how many matching objects to let pass first")
    parser.add_argument("-m", dest="module", help="a module to run instead of a file")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the file, unless -m is given, and its arguments")
    given = parser.parse_args(arguments)
    kill_at(given.at, given.when, skip=given.skip)
    if given.module:
        sys.argv = [given.module, *given.rest]
        runpy.run_module(given.module, run_name="__main__", alter_sys=True)
    elif given.rest:
        sys.argv = list(given.rest)
        sys.path.insert(0, str(Path(given.rest[0]).absolute().parent))
        runpy.run_path(given.rest[0], run_name="__main__")
    else:
        parser.error("give a file to run, or a module with -m")


if __name__ == "__main__":
    main()
