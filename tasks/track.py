"""Parses and checks an environment's `track`, which lists a job's experiment trackers.

Runs before anything starts. Doesn't load the trackers' libraries: a separate process imports them
(`fedpool.tasks.tracker_process`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from fedpool.errors import RecipeError
from fedpool.fields import nearest
from fedpool.paths import check_folder

GROUP = "fedpool.trackers"
"""Entry points of installed packages: a kind, and the module that writes it."""

_LIBRARIES = {"tensorboard": "tensorboardX", "mlflow": "mlflow"}
_MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
_MLFLOW_SCHEMES = frozenset({"sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks"})
_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True)
class Tracker:
    """An experiment tracker.

    Attributes:
        kind: "tensorboard", "mlflow", or one that an installed package registers.
        target: for TensorBoard, the folder to write below; empty: the job's own. For MLflow, the
            URI of its store or server.
    """

    kind: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}" if self.target else self.kind

    @property
    def module(self) -> str:
        """The module whose `make_writer` gives its `Writer` (`fedpool.tasks.tracker_process`).

        A tracker with something `missing` has none.
        """
        if self.kind in _LIBRARIES:
            return f"fedpool.tasks.{self.kind}_writer"
        return _module_name(_registered()[self.kind])

    def check_installed(self) -> None:
        """Refuse a tracker whose library is not installed on this machine.

        Raises:
            RecipeError: names the extra to install.
        """
        if (why := self.missing()) is not None:
            raise RecipeError(f"track={[str(self)]!r}: {why}")

    def missing(self) -> str | None:
        """What is missing or broken, with the remedy; None if the tracker can be used."""
        library = _LIBRARIES.get(self.kind)
        if library is None:
            return _missing_own(self.kind)
        if find_spec(library) is None:
            return f'{library} is not installed: pip install "fedpool[{self.kind}]"'
        return None


def parse_tracker(text: str, *, here: bool) -> Tracker:
    """Parse an entry of an environment's `track`.

    It is `tensorboard`, `tensorboard:FOLDER`, `mlflow:URI`, or `mlflow` for the URI in
    `MLFLOW_TRACKING_URI`.

    Args:
        here: whether the coordinator runs on this machine, so relative paths are allowed.

    Raises:
        RecipeError: the tracker is unknown, or can't write to the target.
    """
    kind, _, target = text.partition(":")
    if kind == "tensorboard":
        return Tracker("tensorboard", _folder(text, target, here=here) if target else "")
    if kind == "mlflow":
        return Tracker("mlflow", _mlflow_uri(text, target or os.environ.get(_MLFLOW_VARIABLE, ""), here=here))
    known = (*_LIBRARIES, *_registered())
    meant = nearest(kind, known)
    if kind in known or (not here and meant is None and kind.isidentifier()):  # the coordinator may have it
        return Tracker(kind, target)
    hint = f"did you mean {meant!r}? " if meant else ""
    raise RecipeError(
        f"track={[text]!r}: {hint}The tracker is unknown: give {' or '.join(map(repr, known))}, or install the package "
        f"that registers it as an entry point of {GROUP}"
    )


def _registered() -> dict[str, EntryPoint]:
    """The trackers that installed packages register. None replaces a built-in one, which a package
    could otherwise do unnoticed. Some may be broken: only who asks for one has to know.
    """
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in _LIBRARIES}


def _module_name(entry: EntryPoint) -> str:
    return entry.value.partition(":")[0].strip()


def _missing_own(kind: str) -> str | None:
    """What is missing or broken of a tracker that an installed package registers."""
    entry = _registered().get(kind)
    if entry is None:
        return f"no installed package registers a tracker {kind!r}"
    module = _module_name(entry)
    package = entry.dist.name if entry.dist else "its package"
    if not all(part.isidentifier() for part in module.split(".")):
        why = "which is not the name of a module"
    elif find_spec(module.partition(".")[0]) is None:  # a look at more would import the package
        why = "which is not installed"
    else:
        return None
    return f"{package} registers it as {entry.value!r} in {GROUP}, {why}: mend or reinstall that package"


def check_places(trackers: Sequence[str], *, is_local: bool) -> None:
    """Refuse TensorBoard without a folder if the job's own folder is not on a local disk.

    Raises:
        RecipeError: it needs a folder.
    """
    if not is_local and "tensorboard" in trackers:
        raise RecipeError(
            "track=['tensorboard']: TensorBoard can write only to a local folder, but the job's store is not one: give a folder "
            "on the coordinator's machine, track=['tensorboard:/FOLDER']"
        )


def _folder(text: str, folder: str, *, here: bool) -> str:
    path = Path(folder).expanduser()
    if "://" in folder:
        raise RecipeError(f"track={[text]!r}: give a folder on the coordinator's machine, not a URL")
    if here:
        return str(check_folder("track", path.absolute()))
    return _absolute(text, path)


def _absolute(text: str, path: Path) -> str:
    if not path.is_absolute():
        raise RecipeError(f"track={[text]!r}: give an absolute path, because the coordinator's machine writes there")
    return str(path)


def _mlflow_uri(text: str, uri: str, *, here: bool) -> str:
    if not uri:
        raise RecipeError(
            f"track={[text]!r}: give MLflow's store, mlflow:sqlite:////FOLDER/mlflow.db or mlflow:https://HOST, or set "
            f"{_MLFLOW_VARIABLE}"
        )
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else ""
    if scheme not in _MLFLOW_SCHEMES:
        raise RecipeError(
            f"track={[text]!r}: MLflow's stores in plain folders are deprecated: give a database, "
            "mlflow:sqlite:////FOLDER/mlflow.db, or a server, mlflow:https://HOST"
        )
    if urlsplit(uri).password is not None:
        raise RecipeError(
            "track: the MLflow URI contains a password, which everyone who can read the job would see: leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the coordinator runs"
        )
    if uri.startswith(_SQLITE):
        path = Path(uri.removeprefix(_SQLITE))
        return _SQLITE + (str(path.absolute()) if here else _absolute(text, path))
    return uri
