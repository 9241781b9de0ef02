"""A file or a module that a script does not find, because it did not travel with it: what to do."""

import re
from collections.abc import Sequence
from pathlib import Path

_NO_FILE = re.compile(r"FileNotFoundError: .*?['\"](?P<path>[^'\"]+)['\"]")
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '(?P<name>[^']+)'")


def missing(printed: Sequence[str], folder: Path) -> list[str]:
    """The remedy, where a traceback ends with something that is not there: a line, or none.

    Args:
        printed: the traceback's lines.
        folder: that the script runs from, a copy of its own folder with what travels.
    """
    for line in reversed(printed):
        if found := _NO_FILE.search(line):
            return _file(found["path"], folder)
        if found := _NO_MODULE.search(line):
            name = found["name"].partition(".")[0]
            return [
                f"If {name!r} is a module of yours, put it beside the script, and name it in the recipe if it is imported by a "
                f"computed name: include=({name + '.py'!r},). If it is a package, install it where the script runs."
            ]
    return []


def _file(path: str, folder: Path) -> list[str]:
    if not Path(path).is_absolute():
        return [
            f"Scripts run in a folder that has no {path!r}. A file of the script's own travels with it if the recipe names it, "
            f"include=({path!r},), and is then found as Path(__file__).parent / {path!r}."
        ]
    scratch = folder.parent
    while scratch.name and not scratch.name.startswith(".fedpool-"):
        scratch = scratch.parent
    if not Path(path).is_relative_to(scratch) or scratch == Path(scratch.anchor):
        return []
    if Path(path).is_relative_to(folder):
        name = Path(path).relative_to(folder).as_posix()
        where = f"name it in the recipe, include=({name!r},)"
    else:
        where = f"copy {Path(path).name!r} into the script's folder and name it in the recipe's include="
    return [
        f"The script runs from a copy of its folder, without its data. If the file is to travel, {where}; else give its path in "
        "train_args."
    ]
