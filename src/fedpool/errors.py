"""All errors that fedpool raises on purpose, in one tree::

    FedpoolError
    ├── ClientError          a client script called the API out of order or with a wrong value
    ├── RecipeError          a recipe or an environment cannot run as written; also a ValueError
    ├── ConfigError          a site's or an environment's configuration is wrong; also a ValueError
    ├── MigrationError       a script that `fedpool migrate` cannot read; also a ValueError
    ├── StoreError           the job's object storage refused, or an object already exists
    │   ├── IntegrityError   bytes that don't match their manifest or their format
    │   │   ├── FilterError  a filter failed, on the way out or back: names the filter
    │   │   └── ModelChanged a global model, or a strategy's state, isn't the committed one
    │   └── StoreRefused     waiting doesn't help: the message has the remedy
    ├── SiteError            a site's script failed: names the site, the round and the cause
    ├── RoundError           a round ended with fewer accepted updates than `min_clients`
    ├── ServerError          the Prefect server didn't start, or refuses
    │   └── Unreachable      the server doesn't answer or is failing: a retry may help
    └── JobError             a job has no result
        ├── JobFailed        because it failed
        └── JobCancelled     because someone cancelled it

An invalid recipe or environment raises `fedpool.fields.FieldsError` when it is built. That is both
a `RecipeError` and pydantic's `ValidationError`, and so a `ValueError`.
"""

from fedpool.storable import storable


class FedpoolError(Exception):
    """The root of the tree. Catch it to catch every error that fedpool raises on purpose."""


class ClientError(FedpoolError, RuntimeError):
    """The client API was called out of order or with a wrong value. The message has the remedy."""


class RecipeError(FedpoolError, ValueError):
    """A recipe or an environment is invalid. The message has the value and the remedy."""


class ConfigError(FedpoolError, ValueError):
    """A site or an environment is misconfigured. The message has the setting and the remedy."""


class MigrationError(FedpoolError, ValueError):
    """A script cannot be migrated and was not changed. The message has the file and the line."""


class StoreError(FedpoolError):
    """The store refused an operation, or a new object's path is already taken."""


class IntegrityError(StoreError):
    """Bytes that don't match their manifest or their format."""


class FilterError(IntegrityError):
    """A filter failed on an outgoing or an incoming update. The message has the filter's name."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"filter {name}: {storable(cause)}")
        self.name = name
        self.cause = cause

    def __reduce__(self) -> tuple[type["FilterError"], tuple[str, str]]:
        return FilterError, (self.name, self.cause)


class ModelChanged(IntegrityError):
    """A global model, or a strategy's state, isn't the committed one. No site is to blame."""


class StoreRefused(StoreError):
    """The store refuses permanently: wrong keys, a full disk. The message has the remedy."""


class SiteError(FedpoolError):
    """A site did not deliver in a round.

    Attributes: `site`, `round` (from 0) and `cause`, a paragraph that ends with the script's
    traceback if there is one; `lost`, whether the site disappeared before it was done, so asking
    again may help; `away`, whether it was unreachable for as long as a round waits for a site.
    """

    def __init__(self, site: str, round: int, cause: str, *, lost: bool = False, away: bool = False) -> None:
        cause = storable(cause)  # most causes end with a script's output
        super().__init__(f"{site}, round {round}: {cause}")
        self.site = site
        self.round = round
        self.cause = cause
        self.lost = lost
        self.away = away

    def __reduce__(self) -> tuple[type["SiteError"], tuple[str, int, str], dict[str, bool]]:
        return SiteError, (self.site, self.round, self.cause), {"lost": self.lost, "away": self.away}


class RoundError(FedpoolError):
    """A round ended with fewer accepted updates than `min_clients`. The message lists causes."""


class ServerError(FedpoolError):
    """The Prefect server refuses, doesn't answer, or didn't start. The message has the cause."""


class Unreachable(ServerError):
    """The server doesn't answer, or fails through a fault of its own. A retry may help."""


class JobError(FedpoolError):
    """A job has no result."""


class JobFailed(JobError):
    """The job failed. The message says in which round and why."""


class JobCancelled(JobError):
    """The job was cancelled before its end."""
