"""Where a job's objects lie in the store: built here and nowhere else, and every name that came
from outside is checked here.

Layout (all safetensors and JSON, nothing pickled)::

    {root}/{job_id}/job.json
    {root}/{job_id}/bundle-{sha256}.zip
    {root}/{job_id}/code-{sha256}.zip              where the recipe is of a class of the user's
    {root}/{job_id}/rounds/00000/global.safetensors
    {root}/{job_id}/rounds/00000/assignments/{site}.json                   none in simulation
    {root}/{job_id}/rounds/00000/sites/{site}/update.safetensors, update.json
    {root}/{job_id}/rounds/00000/sites/{site}/scalars.json     all that its script logged, where
                                                               a job is tracked
    {root}/{job_id}/rounds/00000/attempts/1/...    the same, of sites that were asked again
    {root}/{job_id}/rounds/00000/state.safetensors what the strategy carries into the next round
    {root}/{job_id}/rounds/00000/round.json
    {root}/{job_id}/cross_site.json                where models were scored across sites
    {root}/{job_id}/logs/{site}.log                text; in simulation only, not in the record
    {root}/{job_id}/tracked.json                   where the job is tracked; none in simulation
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
"""What Windows takes for a device, whatever follows the first dot."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_name(what: str, name: str) -> str:
    """Return name if it may be part of a path in the store.

    Raises:
        RecipeError: it is empty, longer than 128, or has other characters than letters, digits,
            `.`, `_` and `-`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(
            f"{what} {name!r} cannot be part of a path: use 1 to 128 letters, digits, '.', '_' or '-', "
            "and begin with a letter or a digit"
        )
    return name


def check_new_names(what: str, names: Iterable[str]) -> None:
    """Check names that are given anew: each must be a folder of its own on every file system, not
    only on this one.

    Names in a job that is there already are checked by `check_name` alone: they have worked where
    they are.

    Raises:
        RecipeError: a name cannot be part of a path, is that of a device under Windows, ends with a
            dot, which Windows drops, or differs from another only in case, which some file systems
            do not tell apart.
    """
    seen: dict[str, str] = {}
    for name in names:
        check_name(what, name)
        if _RESERVED.fullmatch(name):
            raise RecipeError(f"{what} {name!r} is the name of a device under Windows: give it another name")
        if name.endswith("."):
            raise RecipeError(f"{what} {name!r} ends with a dot, which Windows drops: give it another name")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise RecipeError(
                f"{what} {other!r} and {what} {name!r} differ only in case, and would share a folder on some file systems: "
                "give one of them another name"
            )


def check_folder(what: str, path: Path) -> Path:
    """Refuse a folder that cannot be there, because it, or one that it is to lie in, is a file.

    Args:
        what: the field that names it, for the message.
    """
    places = (path.absolute(), *path.absolute().parents)
    nearest = next(place for place in places if os.path.exists(place))  # noqa: PTH110 (that of Path raises where it may not look)
    if not nearest.is_dir():
        where = "is a file" if nearest == places[0] else f"cannot be there: {nearest} is a file"
        raise RecipeError(f"{what} {str(path)!r} {where}. Give a folder, which need not exist yet")
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
        """Says that updates were removed after the job had ended; written once."""
        return f"{self.job_id}/pruned.json"

    @property
    def cross_site(self) -> str:
        """Every site's scores of every model; only with the result is it the job's."""
        return f"{self.job_id}/cross_site.json"

    @property
    def result(self) -> str:
        """What the job came to; its presence says that the job ended."""
        return f"{self.job_id}/result.json"

    @property
    def tracked(self) -> str:
        """Asks the sites for all that their scripts log, by being there."""
        return f"{self.job_id}/tracked.json"

    @property
    def tensorboard(self) -> str:
        """Folder of TensorBoard's files, where nobody names another."""
        return f"{self.job_id}/tensorboard"

    def bundle(self, sha256: str) -> str:
        """The client script and its modules."""
        if not _SHA256.fullmatch(sha256):
            raise RecipeError(f"bundle hash {sha256!r} is not a sha256 in hex")
        return f"{self.job_id}/bundle-{sha256}.zip"

    def code(self, sha256: str) -> str:
        """The recipe's class and what it imports, where it is the user's."""
        if not _SHA256.fullmatch(sha256):
            raise RecipeError(f"code hash {sha256!r} is not a sha256 in hex")
        return f"{self.job_id}/code-{sha256}.zip"

    def global_model(self, round: int) -> str:
        """The model that the round starts from."""
        return f"{self.round(round)}/global.safetensors"

    def state(self, round: int) -> str:
        """What the strategy carries from the round into the next one, beside the global model."""
        return f"{self.round(round)}/state.safetensors"

    def kept(self, site: str) -> str:
        """Folder of what a simulated site keeps for itself; a real one keeps it in a folder of
        its own.
        """
        return f"{self.job_id}/kept/{check_name('site', site)}"

    def log(self, site: str) -> str:
        """What a simulated site's script printed; a real one's is in its Prefect runs."""
        return f"{self.job_id}/logs/{check_name('site', site)}.log"

    def record(self, round: int) -> str:
        """The commit of the round."""
        return f"{self.round(round)}/round.json"

    def sites(self, round: int, attempt: int = 0) -> str:
        """The folder of what sites sent in the round, in one attempt."""
        return f"{self._attempt(round, attempt)}/sites"

    def assignment(self, round: int, site: str, attempt: int = 0) -> str:
        """What a site that is not in this process is asked to do in the round."""
        return f"{self._attempt(round, attempt)}/assignments/{check_name('site', site)}.json"

    def update(self, round: int, site: str, attempt: int = 0) -> str:
        """The tensors that a site sent in the round."""
        return f"{self.sites(round, attempt)}/{check_name('site', site)}/update.safetensors"

    def manifest(self, round: int, site: str, attempt: int = 0) -> str:
        """The manifest that commits a site's update."""
        return f"{self.sites(round, attempt)}/{self.site_manifest(site)}"

    def scalars(self, round: int, site: str, attempt: int = 0) -> str:
        """All that a site's script has logged in the round; not in simulation."""
        return f"{self.sites(round, attempt)}/{check_name('site', site)}/scalars.json"

    def ending(self, round: int, site: str, attempt: int = 0) -> str:
        """How a site's script failed at the end of the job, after this round, which was its
        last; not in simulation.
        """
        return f"{self.sites(round, attempt)}/{check_name('site', site)}/ending.json"

    def round(self, round: int) -> str:
        """The folder of the round."""
        if round < 0:
            raise RecipeError(f"round {round} does not exist: rounds are numbered from 0")
        return f"{self.job_id}/rounds/{round:05d}"

    def _attempt(self, round: int, attempt: int) -> str:
        """Each attempt has a folder of its own: what an earlier one still writes can be taken
        for nothing else.
        """
        return f"{self.round(round)}/attempts/{attempt}" if attempt else self.round(round)
