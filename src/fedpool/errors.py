"""Every error fedpool raises on purpose, in one tree::

    FedpoolError
    ├── ClientError          a client script called the API out of order or with a wrong value
    ├── RecipeError          a recipe or an environment cannot run as written; also a ValueError
    ├── ConfigError          a configuration does not fit what is there; also a ValueError
    ├── MigrationError       a script that `fedpool migrate` cannot read; also a ValueError
    ├── StoreError           the job's object storage refused, or an object is already there
    │   ├── IntegrityError   bytes that are not what their manifest or their format says
    │   │   └── FilterError  what a filter could not make, or could not undo: names the filter
    │   └── StoreRefused     waiting does not help here: the message has the remedy
    ├── SiteError            a site's script failed: names the site, the round and the cause
    ├── RoundError           a round ended with fewer accepted updates than `min_clients`
    ├── ServerError          the Prefect server did not start, or refuses
    │   └── Unreachable      it does not answer just now, or is not itself: another try may help
    └── JobError             a job has no result
        ├── JobFailed        because it failed
        └── JobCancelled     because someone cancelled it

What a recipe or an environment is refused with when it is built is both a `RecipeError` and
pydantic's `ValidationError` (`fedpool.fields.FieldsError`), so a `ValueError` too.
"""

from fedpool.storable import storable


class FedpoolError(Exception):
    """The root of the tree: catch it to catch everything fedpool raises on purpose."""


class ClientError(FedpoolError, RuntimeError):
    """The client API was called out of order or with a wrong value; the message says what to do
    instead.
    """


class RecipeError(FedpoolError, ValueError):
    """A recipe or an environment that cannot run as written; the message names the value and the
    remedy.
    """


class ConfigError(FedpoolError, ValueError):
    """A site or an environment is not set up as it says; the message names the setting, its
    value and the remedy.
    """


class MigrationError(FedpoolError, ValueError):
    """A script cannot be migrated; the message names the file and the line, and the file is left
    as it was.
    """


class StoreError(FedpoolError):
    """The store refused an operation, or an object is already where a new one should go."""


class IntegrityError(StoreError):
    """Bytes that are not what their manifest or their format says."""


class FilterError(IntegrityError):
    """A filter could not make what is to travel, or could not undo what has travelled; the
    message names the filter.
    """

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"filter {name}: {storable(cause)}")
        self.name = name
        self.cause = cause

    def __reduce__(self) -> tuple[type["FilterError"], tuple[str, str]]:
        return FilterError, (self.name, self.cause)


class StoreRefused(StoreError):
    """The store refuses in a way that waiting does not heal: wrong keys, a full disk. The
    message has the remedy.
    """


class SiteError(FedpoolError):
    """A site did not deliver in a round.

    Attributes: `site`, `round` (from 0) and `cause`, one paragraph that ends with the script's
    traceback if it has one; `lost`, whether the site went away with its part undone, so that asking
    again may help; `away`, whether it could not be reached for as long as a round waits for that.
    """

    def __init__(self, site: str, round: int, cause: str, *, lost: bool = False, away: bool = False) -> None:
        cause = storable(cause)  # most of them end with what a script has printed
        super().__init__(f"{site}, round {round}: {cause}")
        self.site = site
        self.round = round
        self.cause = cause
        self.lost = lost
        self.away = away

    def __reduce__(self) -> tuple[type["SiteError"], tuple[str, int, str], dict[str, bool]]:
        return SiteError, (self.site, self.round, self.cause), {"lost": self.lost, "away": self.away}


class RoundError(FedpoolError):
    """A round ended with fewer accepted updates than `min_clients`; the message names each site
    and its cause.
    """


class ServerError(FedpoolError):
    """The Prefect server did not start, and the message ends with what it printed; or it does
    not answer, or refuses.
    """


class Unreachable(ServerError):
    """The server does not answer just now, or fails by a fault of its own: another try may help."""


class JobError(FedpoolError):
    """A job has no result to give."""


class JobFailed(JobError):
    """The job failed; the message says in which round and why."""


class JobCancelled(JobError):
    """The job was cancelled before its end."""
