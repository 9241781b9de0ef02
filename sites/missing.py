"""The remedy when a script does not find a file or a module that did not travel with it."""

import re
from collections.abc import Sequence
from pathlib import Path

_NO_FILE = re.compile(r"FileNotFoundError: .*?['\"](?P<path>[^'\"]+)['\"]")
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '(?P<name>[^']+)'")


def missing(printed: Sequence[str], folder: Path) -> list[str]:
    """The remedy if a traceback ends with a missing file or module: a list of one line, or empty.

    Args:
        printed: the traceback's lines.
        folder: the folder that the script runs from, a copy of its own folder without the files
            that do not travel.
    """
    for line in reversed(printed):
        if found := _NO_FILE.search(line):
            return _file(found["path"], folder)
        if found := _NO_MODULE.search(line):
            name = found["name"].partition(".")[0]
            return [
                f"If {name!r} is a module of yours, put it next to the script; if it is imported by a computed name, also name "
                f"it in the recipe: include=({name + '.py'!r},). If it is a package, install it where the script runs."
            ]
    return []


def _file(path: str, folder: Path) -> list[str]:
    if not Path(path).is_absolute():
        return [
            f"Scripts run in a folder that has no {path!r}. A file in the script's folder travels if the recipe names it: "
            f"include=({path!r},). The script then finds it as Path(__file__).parent / {path!r}."
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
        f"The script runs from a copy of its folder that leaves data out. If the file should travel, {where}; otherwise give its "
        "path in train_args."
    ]
