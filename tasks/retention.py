"""How long updates are kept: they are most of what a job stores, and are needed to verify and to
replay it.

Manifests stay, and with them all hashes; so do rejected updates, for their owners to see. A late
update goes with the round in which it counted, and stays until then.
"""

from collections.abc import Sequence
from typing import Literal

from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.record import LateAcceptedEntry, LateProbedEntry, RoundRecord

KeepUpdates = Literal["all", "last", "none"]


def outdated(records: Sequence[RoundRecord], keep: KeepUpdates) -> Sequence[RoundRecord]:
    """The rounds whose updates are not kept, oldest first: evaluations have none.

    Models that sites have submitted go with all but "all": each lies in the store once more, as the
    model of a round.
    """
    training = [record for record in records if record.task == "train"]
    submitted = [record for record in records if record.task == "submit_model" and keep != "all"]
    return [*training[: len(training) - {"all": len(training), "last": 1, "none": 0}[keep]], *submitted]


def drop_updates(store: Store, job_id: str, record: RoundRecord) -> int:
    """Remove the accepted updates of a round that is committed, and the state that it started
    from; returns the bytes freed.
    """
    paths, number = JobPaths(job_id), record.round
    sent = [entry for entry in (*record.accepted, *record.probed) if entry.sha256 is not None]
    gone = [paths.update(number, entry.site, entry.attempt) for entry in sent]
    late: list[LateAcceptedEntry | LateProbedEntry] = [*record.late_accepted, *record.late_probed]
    gone += [paths.update(entry.round, entry.site, entry.attempt) for entry in late]
    freed = 0
    if number > 0:
        gone.append(paths.state(number - 1))
    for path in gone:
        if store.exists(path):
            freed += store.size(path)
            store.remove(path)
    return freed
