"""Which trackers of experiments a job has: what an environment's `track` says, checked before
anything runs.

Loads none of their libraries: they are imported in a process of their own
(`fedpool.tasks.tracker_process`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from fedpool.errors import RecipeError
from fedpool.fields import nearest
from fedpool.paths import check_folder

Kind = Literal["tensorboard", "mlflow"]

_LIBRARIES: dict[Kind, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow"}
_MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
_MLFLOW_SCHEMES = frozenset({"sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks"})
_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True)
class Tracker:
    """A tracker of experiments.

    Attributes:
        target: TensorBoard: the folder to write below, empty for the job's own. MLflow: URI of its
            store or server.
    """

    kind: Kind
    target: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}" if self.target else self.kind

    def check_installed(self) -> None:
        """Refuse a tracker whose library this machine lacks.

        Raises:
            RecipeError: names the extra.
        """
        if (why := self.missing()) is not None:
            raise RecipeError(f"track={[str(self)]!r}: {why}")

    def missing(self) -> str | None:
        """What this machine lacks for it; None when nothing."""
        library = _LIBRARIES[self.kind]
        if find_spec(library) is None:
            return f'{library} is not installed: pip install "fedpool[{self.kind}]"'
        return None


def parse_tracker(text: str, *, here: bool) -> Tracker:
    """A tracker, as an environment's `track` names it: `tensorboard`, `tensorboard:FOLDER`,
    `mlflow:URI`, or `mlflow` for the URI of `MLFLOW_TRACKING_URI`.

    Args:
        here: whether the coordinator runs on this machine, so that a relative path means one.

    Raises:
        RecipeError: there is no such tracker, or it cannot write there.
    """
    kind, _, target = text.partition(":")
    if kind == "tensorboard":
        return Tracker("tensorboard", _folder(text, target, here=here) if target else "")
    if kind == "mlflow":
        return Tracker("mlflow", _mlflow_uri(text, target or os.environ.get(_MLFLOW_VARIABLE, ""), here=here))
    known = get_args(Kind)
    meant = nearest(kind, known)
    hint = f"did you mean {meant!r}? " if meant else ""
    raise RecipeError(f"track={[text]!r}: {hint}There is no such tracker: give {' or '.join(map(repr, known))}")


def check_places(trackers: Sequence[str], *, is_local: bool) -> None:
    """Refuse TensorBoard without a folder where the job's own is not on a local disk.

    Raises:
        RecipeError: it has none.
    """
    if not is_local and "tensorboard" in trackers:
        raise RecipeError(
            "track=['tensorboard']: TensorBoard's files cannot lie in a store that is not a local folder: name a folder of the "
            "coordinator's machine, track=['tensorboard:/FOLDER']"
        )


def _folder(text: str, folder: str, *, here: bool) -> str:
    path = Path(folder).expanduser()
    if "://" in folder:
        raise RecipeError(f"track={[text]!r}: give a folder of the coordinator's machine, not a URL")
    if here:
        return str(check_folder("track", path.absolute()))
    return _absolute(text, path)


def _absolute(text: str, path: Path) -> str:
    if not path.is_absolute():
        raise RecipeError(f"track={[text]!r}: give an absolute path: it is the coordinator's machine that writes there")
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
            "track: the URI of MLflow has a password in it, which everybody who sees the job would read: leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the coordinator runs"
        )
    if uri.startswith(_SQLITE):
        path = Path(uri.removeprefix(_SQLITE))
        return _SQLITE + (str(path.absolute()) if here else _absolute(text, path))
    return uri
