"""Events that a job emits to the Prefect server, for automations and other listeners."""

from prefect.events import emit_event

from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Rejected

UPDATE_REJECTED = "fedpool.update.rejected"


def emit_rejected(expected: Expected, rejected: Rejected) -> None:
    """Emit an event for a rejected update. It is sent in the background, so no round waits for it.

    The event's resource is `fedpool.site.SITE`. Its related resource is the job,
    `fedpool.job.JOB_ID`.
    """
    emit_event(
        UPDATE_REJECTED,
        resource={"prefect.resource.id": f"fedpool.site.{rejected.site}", "prefect.resource.name": rejected.site},
        related=[{"prefect.resource.id": f"fedpool.job.{expected.job_id}", "prefect.resource.role": "fedpool-job"}],
        payload={
            "job_id": expected.job_id,
            "site": rejected.site,
            "round": expected.round,
            "attempt": rejected.attempt,
            "code": rejected.code,
            "reason": rejected.reason,
        },
    )
