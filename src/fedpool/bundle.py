"""The client bundle: the client script and whatever it imports from its own folder, as a content-addressed zip.

Imports are found in the source (also those inside functions), recursively through the script's own modules; what is
imported by a computed name needs `include=`. Same files, same bytes: names are sorted, times fixed.
"""

import ast
import compileall
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fedpool.errors import IntegrityError, RecipeError

_CANNOT_UNPACK = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError)
"""A damaged or encrypted member, one that is packed in an unknown way, a name that no file can have, or that another has."""
MAX_BUNDLE_BYTES = 64 << 20
"""Unpacked size limit: code travels in the bundle, data stays at its site."""

_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A client script ready to travel.

    Attributes:
        entry: the script's name inside the zip.
        sha256: of the zip.
        imports: dotted names that the script and its modules import from outside the bundle; what a session preloads.
        data: the zip's bytes.
    """

    entry: str
    sha256: str
    imports: tuple[str, ...]
    data: bytes = field(repr=False, compare=False)


def build_bundle(script: str | Path, include: Sequence[str] = ()) -> Bundle:
    """Bundle a script, what it imports from its own folder, and the files and folders named in `include`.

    Args:
        script: path of the client script.
        include: paths relative to the script's folder, and inside it.

    Raises:
        RecipeError: a file is missing, does not compile, lies outside the folder, or the whole exceeds the size limit.
    """
    path = Path(script)
    if not path.is_file():
        raise RecipeError(
            f"train_script {str(script)!r} is not a file (looked in {Path.cwd()}): give the path of the client script"
        )
    path = path.resolve()  # as Python does: a linked script imports from beside its target
    folder = path.parent
    files: dict[str, bytes] = {}
    imports: set[str] = set()
    pending = [path]
    while pending:
        file = pending.pop()
        name = file.relative_to(folder).as_posix()
        if name in files:
            continue
        files[name] = file.read_bytes()
        for module in _imports(name, files[name]):
            local = list(_local_files(folder, module))
            pending.extend(local)
            if not local:
                imports.add(module)
    included = {name for item in include for name in _included(folder, item)}
    sizes = {name: len(data) for name, data in files.items()}
    sizes |= {name.as_posix(): (folder / name).stat().st_size for name in included}  # before any of it is read
    size = sum(sizes.values())
    if size > MAX_BUNDLE_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RecipeError(
            f"the bundle of {path.name} would hold {size / 2**20:.1f} MiB, over the limit of {MAX_BUNDLE_BYTES >> 20} MiB "
            f"(largest: {largest}, {sizes[largest] / 2**20:.1f} MiB): leave data at the site and give its path in train_args"
        )
    files |= {name.as_posix(): (folder / name).read_bytes() for name in included}
    data = _zip(files)
    return Bundle(path.name, hashlib.sha256(data).hexdigest(), tuple(sorted(imports)), data)


def unpack_bundle(data: bytes, folder: Path, *, sha256: str) -> None:
    """Unpack a bundle into an empty folder.

    Raises:
        IntegrityError: the bytes do not have that hash, or a name points outside the folder.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise IntegrityError(f"the bundle has sha256 {found}, its job says {sha256}")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise IntegrityError(f"the bundle is not a zip: {error}") from None
    with archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_BUNDLE_BYTES:
            raise IntegrityError(f"the bundle would unpack to more than {MAX_BUNDLE_BYTES >> 20} MiB")
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename)
            outside = name.is_absolute() or ".." in name.parts or "\\" in entry.filename
            if outside or not name.parts or entry.filename.endswith("/"):
                raise IntegrityError(f"the bundle holds {entry.filename!r}, which is not a file inside its folder")
            target = folder / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(entry))
            except _CANNOT_UNPACK as error:
                raise IntegrityError(
                    f"the bundle holds {entry.filename!r}, which cannot be unpacked: {error}"
                ) from None
    compileall.compile_dir(folder, quiet=2)  # here, once, and not in each of a thousand scripts


def _imports(name: str, source: bytes) -> Iterator[str]:
    """Dotted names of what a module imports; `from a import b` gives `a.b`, which may be a module or not."""
    try:
        tree = ast.parse(source, filename=name)
        compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{name} does not compile: {error}") from None
    package = PurePosixPath(name).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join((*package[: len(package) - node.level + 1], node.module or "")) if node.level else node.module
            )
            base = (base or "").strip(".")
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names if alias.name != "*")
            if any(alias.name == "*" for alias in node.names):
                yield base


def _local_files(folder: Path, module: str) -> Iterator[Path]:
    """The files beside the script that importing `module` would run; none when it is not a module of the folder."""
    here = folder
    for part in module.split("."):
        # In Python's order: a package, a module, a folder without __init__.
        if (here / part / "__init__.py").is_file():
            here = here / part
            yield here / "__init__.py"
        elif (here / f"{part}.py").is_file():
            yield here / f"{part}.py"
            return
        elif (here / part).is_dir():
            here = here / part
        else:
            return


def _included(folder: Path, item: str) -> Iterator[Path]:
    path = folder / item
    if not path.exists():
        raise RecipeError(
            f"include={item!r} does not exist in {folder}: give paths relative to the client script's folder"
        )
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.resolve().is_relative_to(folder):
            raise RecipeError(
                f"include={item!r} leads outside the client script's folder ({file.resolve()}): copy it in"
            )
        if file.is_file() and "__pycache__" not in file.parts:
            yield Path(os.path.normpath(file)).relative_to(folder)


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
