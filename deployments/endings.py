"""How client scripts failed after their last round, while they finished up.

In a simulation the job waits for its scripts, so its result has these failures. Sites elsewhere
learn from the result that the job has ended, so they report failures later, next to the objects of
their last round.
"""

from collections.abc import Mapping, Sequence

from fedpool.errors import StoreError
from fedpool.paths import JobPaths
from fedpool.site_order import in_order
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks.job_record import JobResult
from fedpool.tasks.record import RoundRecord

_MAX_BYTES = 1 << 16


def read_endings(store: Store, job_id: str, result: JobResult, records: Sequence[RoundRecord]) -> dict[str, str]:
    """site -> how its script failed, as far as is known now.

    Args:
        result: the job's result.
        records: the records of all its rounds.
    """
    paths = JobPaths(job_id)
    found: dict[str, str] = dict(result.endings)
    last = {
        entry.site: (record.round, entry.attempt)
        for record in records
        for entry in (*record.accepted, *record.rejected, *record.probed, *record.late)
    }
    for round, attempt in sorted(set(last.values())):
        folder = paths.sites(round, attempt)
        there = set(store.tree(folder))
        for site, where in last.items():
            path = paths.ending(round, site, attempt)
            if where == (round, attempt) and path.removeprefix(f"{folder}/") in there:
                found[site] = _read(store, path)
    return {site: found[site] for site in in_order(found)}


def tell_endings(endings: Mapping[str, str]) -> list[str]:
    """One line of text for each script that failed after its last round."""
    return [f"{site}: after its last round, {how}" for site, how in endings.items()]


def _read(store: Store, path: str) -> str:
    """Read a site's report, which is not trusted to have any form."""
    try:
        if store.size(path) > _MAX_BYTES:
            return f"{store.full(path)} is longer than {_MAX_BYTES} bytes"
        return storable(str(store.read_json(path)["how"]))
    except (OSError, StoreError, ValueError, KeyError, TypeError) as error:
        return f"{store.full(path)} cannot be read: {error}"
