"""How long updates are kept. They are most of a job's data, and needed to verify and replay it.

Manifests always stay, and with them all hashes. So do rejected updates, for their owners to
inspect. A late update stays until the round in which it counts is outdated.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from fedpool.errors import IntegrityError
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.record import LateAcceptedEntry, LateProbedEntry, RoundRecord

KeepUpdates = Literal["all", "last", "none"]


def outdated(records: Sequence[RoundRecord], keep: KeepUpdates) -> Sequence[RoundRecord]:
    """The rounds whose updates are not kept, oldest first. Evaluations have none.

    With any value except "all", submitted models are removed as well: each is also stored as the
    global model of a round.
    """
    training = [record for record in records if record.task == "train"]
    submitted = [record for record in records if record.task == "submit_model" and keep != "all"]
    return [*training[: len(training) - {"all": len(training), "last": 1, "none": 0}[keep]], *submitted]


def drop_updates(store: Store, job_id: str, record: RoundRecord) -> int:
    """Remove a committed round's accepted updates and its starting state; returns bytes freed."""
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
            with suppress(IntegrityError):  # its site has put something else in its place since
                freed += store.size(path)
            store.remove(path)
    return freed
