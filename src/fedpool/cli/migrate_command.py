"""The command `fedpool migrate`, which turns scripts for NVFlare into scripts for fedpool."""

import difflib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedpool.errors import MigrationError
from fedpool.migration.remarks import remarks
from fedpool.migration.rewrite import rewrite
from fedpool.migration.source import Source


def migrate(
    *paths: Annotated[Path, Parameter(help="client scripts, and folders of them")],
    diff: Annotated[bool, Parameter(help="print the changes without making them", negative="")] = False,
    write: Annotated[bool, Parameter(help="with --diff: also change the files", negative="")] = False,
) -> None:
    """Rewrite the imports of scripts for NVFlare, and list line by line what you have to do by
    hand.
    """
    if not paths:
        raise MigrationError("name the scripts to migrate, or a folder of them: fedpool migrate client.py")
    failed = False
    for path in _scripts(paths):
        try:
            _migrate(path, diff=diff, write=write or not diff)
        except MigrationError as error:
            print(error, file=sys.stderr)
            failed = True
    if failed:
        raise MigrationError("not all scripts were migrated: see above")


def _scripts(paths: tuple[Path, ...]) -> list[Path]:
    found = []
    for path in paths:
        if not path.exists():
            raise MigrationError(f"{path} does not exist")
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


def _migrate(path: Path, *, diff: bool, write: bool) -> None:
    source = Source.read(path)
    if "nvflare" not in source.text and "fedpool" not in source.text:
        return
    result = rewrite(source)
    left = remarks(result)
    before, after = source.text.splitlines(keepends=True), result.text.splitlines(keepends=True)
    if diff:
        sys.stdout.writelines(difflib.unified_diff(before, after, str(path), str(path)))
    if result.text != source.text and write:
        _replace(path, result)
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    num_lines = sum(end - start for kind, start, end, _, _ in matcher.get_opcodes() if kind != "equal")
    if num_lines or left:
        verb = "rewritten" if write else "to rewrite"
        print(f"{path}: {num_lines} {'line' if num_lines == 1 else 'lines'} {verb}, {len(left)} left to look at")
    for remark in left:
        print(f"{path}:{remark.line}: {remark.subject}: {remark.advice}")


def _replace(path: Path, source: Source) -> None:
    """Write a file anew, completely or not at all."""
    target = path.resolve()
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            file.write(source.text.encode(source.encoding))
        written = Path(file.name)
        written.chmod(target.stat().st_mode)
        written.replace(target)
    except OSError as error:
        raise MigrationError(f"{path} cannot be written: {error}") from None
