"""Judges the late updates of a job again while verifying it, each against its own round."""

from fedpool.flows.expected import expected
from fedpool.flows.late_updates import folds
from fedpool.flows.verify_errors import differs
from fedpool.flows.verify_updates import UpdateAudit
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.store import Store
from fedpool.tasks.committed import Committed
from fedpool.tasks.gate import Accepted, Arrival, Probed, Rejected, counting_in
from fedpool.tasks.ledger import Ledger
from fedpool.tasks.record import JudgedLate, LateRejectedEntry, RoundRecord
from fedpool.tasks.staleness import awaited
from fedpool.tasks.strategy import Strategy


def late_again(
    recipe: Recipe,
    strategy: Strategy,
    store: Store,
    committed: Committed,
    ledger: Ledger,
    record: RoundRecord,
    audit: UpdateAudit,
) -> list[Arrival]:
    """The late updates that a record names, judged again.

    Args:
        committed: opens the job's models.
        ledger: of the rounds before it.

    Raises:
        IntegrityError: an update was not owed: it was in time, or has counted already.
    """
    owed = awaited(ledger.records) if folds(recipe) else []
    arrivals = []
    for entry in record.judged_late:
        found = [one for one in owed if (one.round, one.site) == (entry.round, entry.site)]
        if not found or entry.attempt < found[0].attempts[0]:
            path = JobPaths(record.job_id).record(record.round)
            how = f"has a late update of {entry.site} from round {entry.round}, attempt {entry.attempt}, which was not owed"
            raise differs(store, path, how)
        owed.remove(found[0])
        arrivals.append(Arrival(entry.round, _judged(recipe, strategy, committed, ledger, record.round, entry, audit)))
    return arrivals


def _judged(
    recipe: Recipe,
    strategy: Strategy,
    committed: Committed,
    ledger: Ledger,
    number: int,
    entry: JudgedLate,
    audit: UpdateAudit,
) -> Accepted | Rejected | Probed:
    job, head = ledger.job, ledger.records[entry.round].base
    base = committed.tensors(JobPaths(job.job_id).global_model(entry.round), head)
    wanted = expected(recipe, strategy, job.job_id, entry.round, "train", head, base, job.holes, job.arithmetic)
    if isinstance(entry, LateRejectedEntry):
        return audit.judge_rejected(entry.round, entry, wanted)
    outcome = audit.passed(entry.round, entry, wanted)
    return outcome if isinstance(outcome, Probed) else counting_in(number, outcome, wanted)
