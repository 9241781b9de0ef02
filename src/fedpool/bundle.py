"""The client bundle: a content-addressed zip of the client script and the files that it needs.

`script_files` finds those files in the source. Others, such as modules imported by a computed name,
need `include=`. The same files give the same bytes: names are sorted and times are fixed.
"""

import compileall
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fedpool.client_use import missing_client
from fedpool.errors import IntegrityError, RecipeError
from fedpool.messages import inside_bundle
from fedpool.refusals import explained
from fedpool.script_files import ScriptFiles, find_files

_CANNOT_UNPACK = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError)
"""Errors from a zip or a member that is damaged, encrypted, or has an impossible or duplicate name.
"""
MAX_BUNDLE_BYTES = 64 << 20
"""Unpacked size limit: code travels in the bundle, data stays at its site."""
MAX_ZIP_BYTES = MAX_BUNDLE_BYTES + (16 << 20)
"""Limit on the zip itself: incompressible files get a little larger, and every file has a name."""
MAX_FILES = 10_000

_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The others inflate a member as a whole, whatever its size."""
_CHUNK_BYTES = 1 << 16

_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A client script ready to travel.

    Attributes:
        entry: the script's name inside the zip.
        sha256: hash of the zip.
        imports: dotted names that the script and its modules import from outside the bundle, for a
            session to preload; empty if the script sets environment variables before an import.
        data: the zip's bytes.
        notes: notes for the person who runs the script, one line each.
    """

    entry: str
    sha256: str
    imports: tuple[str, ...]
    data: bytes = field(repr=False, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Raises `RecipeError` if the script's name leads out of the bundle."""
        try:
            inside_bundle(self.entry)
        except ValueError as error:
            raise RecipeError(f"the client script {error}") from None


def build_bundle(script: str | Path, include: Sequence[str] = ()) -> Bundle:
    """Bundle a script, the files that it needs, and the files and folders named in `include`.

    Args:
        script: path of the client script.
        include: paths relative to the script's folder, and inside it.

    Raises:
        RecipeError: a file is missing, does not compile, lies outside the folder, or the whole
            exceeds the size limit; the script is empty, or was written for NVFlare.
    """
    path = Path(script)
    if not path.is_file():
        raise RecipeError(
            f"train_script {str(script)!r} is not a file (looked in {Path.cwd()}): give the path of the client script"
        )
    path = path.resolve()  # like Python, which imports from the folder of a link's target
    folder = path.parent
    found = find_files(path)
    contents = {file.relative_to(found.root).as_posix(): data for file, data in found.modules.items()}
    others = {folder / name for item in include for name in _included(folder, item)} | set(found.named)
    names = {file.relative_to(found.root).as_posix(): file for file in others}
    sizes = {name: len(data) for name, data in contents.items()}
    sizes |= {name: file.stat().st_size for name, file in names.items()}  # before reading any of them
    size = sum(sizes.values())
    if len(sizes) > MAX_FILES:
        raise RecipeError(
            f"the bundle of {path.name} would contain {len(sizes)} files, over the limit of {MAX_FILES}: name fewer files and "
            "folders in include, and leave data at the site"
        )
    if size > MAX_BUNDLE_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RecipeError(
            f"the bundle of {path.name} would be {size / 2**20:.1f} MiB, over the limit of {MAX_BUNDLE_BYTES >> 20} MiB "
            f"(largest: {largest}, {sizes[largest] / 2**20:.1f} MiB): leave data at the site and give its path in train_args"
        )
    contents |= {name: file.read_bytes() for name, file in names.items()}
    data = zip_files(contents)
    entry = path.relative_to(found.root).as_posix()
    no_client = missing_client(entry, found.trees, contents.values())
    return Bundle(
        entry=entry,
        sha256=hashlib.sha256(data).hexdigest(),
        imports=() if found.early_setting else tuple(sorted(found.imports)),
        data=data,
        notes=(*_notes(path, found), *([no_client] if no_client else [])),
    )


def _notes(script: Path, found: ScriptFiles) -> Iterator[str]:
    outside = [file for file in found.modules if not file.is_relative_to(script.parent)]
    if with_it := sorted(os.path.relpath(file, script.parent) for file in [*found.named, *outside]):
        verb, them = ("travels", "it") if len(with_it) == 1 else ("travel", "them")
        yield f"{', '.join(with_it)} {verb} with {script.name}, because the script names {them}"
    if found.early_setting:
        yield (f"{found.early_setting}: nothing is imported in advance, so each site takes longer to start")


def unpack_bundle(data: bytes, folder: Path, *, sha256: str) -> None:
    """Unpack a bundle into an empty folder.

    Inflates a little at a time, and no more than a file says that it has.

    Raises:
        IntegrityError: the bytes have another hash, a name points outside the folder, or a limit is
            exceeded.
        StoreRefused: the folder isn't writable.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise IntegrityError(f"the bundle has sha256 {found}, but its job names {sha256}")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except _CANNOT_UNPACK as error:
        raise IntegrityError(f"the bundle is not a zip: {error}") from None
    with archive:
        _check_members(archive.infolist())
        for entry in archive.infolist():
            target = folder / PurePosixPath(entry.filename)
            try:
                with explained(target):
                    _unpack(archive, entry, target)
            except _CANNOT_UNPACK as error:
                raise IntegrityError(
                    f"the bundle contains {entry.filename!r}, which cannot be unpacked: {error}"
                ) from None
    compileall.compile_dir(folder, quiet=2)  # once here, rather than in each of a thousand scripts


def _check_members(members: Sequence[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_FILES:
        raise IntegrityError(f"the bundle contains {len(members)} files, but only {MAX_FILES} are allowed")
    if sum(entry.file_size for entry in members) > MAX_BUNDLE_BYTES:
        raise IntegrityError(f"the bundle would unpack to more than {MAX_BUNDLE_BYTES >> 20} MiB")
    for entry in members:
        name = PurePosixPath(entry.filename)
        outside = name.is_absolute() or ".." in name.parts or "\\" in entry.filename
        if outside or not name.parts or entry.filename.endswith("/"):
            raise IntegrityError(f"the bundle contains {entry.filename!r}, which is not a file inside its folder")
        if entry.compress_type not in _KINDS:
            raise IntegrityError(f"the bundle contains {entry.filename!r}, which is neither stored nor deflated")


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Unpack a file. Leaves nothing of one that is damaged."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(entry) as member, target.open("wb") as file:
            while chunk := member.read(_CHUNK_BYTES):
                file.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError):
        target.unlink(missing_ok=True)
        raise


def check_entry(entry: str, folder: Path) -> None:
    """Check that a job's script is a file of its unpacked bundle.

    Raises:
        IntegrityError: it isn't.
    """
    path = folder / entry
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"the job runs {entry!r}, which is not a file of its bundle")


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


def zip_files(files: dict[str, bytes]) -> bytes:
    """A zip of files by their names. The same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
