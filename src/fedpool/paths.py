"""Paths of a job's objects in the store, built only here, from names that are checked.

Layout (all safetensors and JSON, no pickles)::

    {root}/{job_id}/job.json
    {root}/{job_id}/bundle-{sha256}.zip
    {root}/{job_id}/code-{sha256}.zip              if the recipe's class is the user's own
    {root}/{job_id}/rounds/00000/global.safetensors
    {root}/{job_id}/rounds/00000/assignments/{site}.json                   not in simulation
    {root}/{job_id}/rounds/00000/sites/{site}/update.safetensors, update.json
    {root}/{job_id}/rounds/00000/sites/{site}/scalars.json     everything that the script logged,
                                                               if the job is tracked
    {root}/{job_id}/rounds/00000/attempts/1/...    the same, for sites that were asked again
    {root}/{job_id}/rounds/00000/state.safetensors the strategy's state for the next round
    {root}/{job_id}/rounds/00000/round.json
    {root}/{job_id}/cross_site.json                if models were scored across sites
    {root}/{job_id}/logs/{site}.log                text; only in simulation, not in the record
    {root}/{job_id}/tracked.json                   where the job is tracked; not in simulation
    {root}/{job_id}/tensorboard/{run}/events.out.tfevents.*    TensorBoard's files, not in the
                                                               record
    {root}/{job_id}/result.json
"""

import os.path
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedpool.errors import RecipeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names that Windows takes for devices, with any extension."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_name(what: str, name: str) -> str:
    """Return name if it can be part of a path in the store.

    Raises:
        RecipeError: it is empty, longer than 128, or has characters other than letters, digits,
            `.`, `_` and `-`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(
            f"{what} {name!r} cannot be part of a path: use 1 to 128 letters, digits, '.', '_' or '-', "
            "and begin with a letter or a digit"
        )
    return name


def check_new_names(what: str, names: Iterable[str]) -> None:
    """Check new names: each must give a folder of its own on every file system, not just this one.

    Names in existing jobs only need `check_name`, because they have worked where they are.

    Raises:
        RecipeError: a name can't be part of a path, is that of a Windows device, ends with a dot,
            which Windows drops, or differs from another only in case, which some file systems
            ignore.
    """
    seen: dict[str, str] = {}
    for name in names:
        check_name(what, name)
        if _RESERVED.fullmatch(name):
            raise RecipeError(f"{what} {name!r} is the name of a device on Windows: choose another name")
        if name.endswith("."):
            raise RecipeError(f"{what} {name!r} ends with a dot, which Windows drops: choose another name")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise RecipeError(
                f"{what} {other!r} and {what} {name!r} differ only in case, and would share a folder on some file systems: "
                "rename one of them"
            )


def check_folder(what: str, path: Path) -> Path:
    """Refuse a folder that can't exist, because it, or a folder above it, is a file.

    Args:
        what: the field that names it, for the message.
    """
    places = (path.absolute(), *path.absolute().parents)
    nearest = next(place for place in places if os.path.exists(place))  # noqa: PTH110 (that of Path raises where it may not look)
    if not nearest.is_dir():
        where = "is a file" if nearest == places[0] else f"cannot exist: {nearest} is a file"
        raise RecipeError(f"{what} {str(path)!r} {where}. Give a folder; it need not exist yet")
    return path


def new_job_id(name: str) -> str:
    """An id for a new job of a recipe: name, time (UTC) and six random hex digits."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class JobPaths:
    """The paths of one job inside the store."""

    job_id: str

    def __post_init__(self) -> None:
        check_name("job_id", self.job_id)

    @staticmethod
    def site_manifest(site: str) -> str:
        """The manifest that commits a site's update, relative to the round's `sites`."""
        return f"{check_name('site', site)}/update.json"

    @property
    def job(self) -> str:
        """The manifest of the job."""
        return f"{self.job_id}/job.json"

    @property
    def pruned(self) -> str:
        """Says that updates were removed after the job ended; written once."""
        return f"{self.job_id}/pruned.json"

    @property
    def cross_site(self) -> str:
        """Every site's scores of every model; part of the job only once there is a result."""
        return f"{self.job_id}/cross_site.json"

    @property
    def result(self) -> str:
        """The job's result; it exists once the job has ended."""
        return f"{self.job_id}/result.json"

    @property
    def tracked(self) -> str:
        """Its existence asks the sites for everything that their scripts log."""
        return f"{self.job_id}/tracked.json"

    @property
    def tensorboard(self) -> str:
        """Folder of TensorBoard's files, by default."""
        return f"{self.job_id}/tensorboard"

    def bundle(self, sha256: str) -> str:
        """The client script and its modules."""
        if not _SHA256.fullmatch(sha256):
            raise RecipeError(f"bundle hash {sha256!r} is not a sha256 in hex")
        return f"{self.job_id}/bundle-{sha256}.zip"

    def code(self, sha256: str) -> str:
        """The user's recipe class and the modules that it imports."""
        if not _SHA256.fullmatch(sha256):
            raise RecipeError(f"code hash {sha256!r} is not a sha256 in hex")
        return f"{self.job_id}/code-{sha256}.zip"

    def global_model(self, round: int) -> str:
        """The model that the round starts from."""
        return f"{self.round(round)}/global.safetensors"

    def state(self, round: int) -> str:
        """The strategy's state that the round leaves to the next one."""
        return f"{self.round(round)}/state.safetensors"

    def kept(self, site: str) -> str:
        """Folder for state that a simulated site keeps; a real site has a folder of its own."""
        return f"{self.job_id}/kept/{check_name('site', site)}"

    def log(self, site: str) -> str:
        """Output of a simulated site's script; a real site's is in its Prefect runs."""
        return f"{self.job_id}/logs/{check_name('site', site)}.log"

    def record(self, round: int) -> str:
        """The commit of the round."""
        return f"{self.round(round)}/round.json"

    def sites(self, round: int, attempt: int = 0) -> str:
        """The folder of what sites sent in one attempt of the round."""
        return f"{self._attempt(round, attempt)}/sites"

    def assignment(self, round: int, site: str, attempt: int = 0) -> str:
        """The assignment of a site in another process."""
        return f"{self._attempt(round, attempt)}/assignments/{check_name('site', site)}.json"

    def update(self, round: int, site: str, attempt: int = 0) -> str:
        """The tensors that a site sent in the round."""
        return f"{self.sites(round, attempt)}/{check_name('site', site)}/update.safetensors"

    def manifest(self, round: int, site: str, attempt: int = 0) -> str:
        """The manifest that commits a site's update."""
        return f"{self.sites(round, attempt)}/{self.site_manifest(site)}"

    def scalars(self, round: int, site: str, attempt: int = 0) -> str:
        """Everything that a site's script logged in the round; not in simulation."""
        return f"{self.sites(round, attempt)}/{check_name('site', site)}/scalars.json"

    def ending(self, round: int, site: str, attempt: int = 0) -> str:
        """How a site's script failed at the end of the job, after its last round; not simulated."""
        return f"{self.sites(round, attempt)}/{check_name('site', site)}/ending.json"

    def round(self, round: int) -> str:
        """The folder of the round."""
        if round < 0:
            raise RecipeError(f"round {round} does not exist: rounds are numbered from 0")
        return f"{self.job_id}/rounds/{round:05d}"

    def _attempt(self, round: int, attempt: int) -> str:
        """Each attempt has its own folder, so late writes of an earlier one can't be mistaken."""
        return f"{self.round(round)}/attempts/{attempt}" if attempt else self.round(round)
