"""The digest of everything that a job makes its sites run.

Two jobs with the same digest run the same code with the same command line and configuration, and
the same parts of the model leave the sites in the same form. It doesn't cover what differs between
runs of the same work: the job's id, its seed, its number of rounds and its models.
"""

import hashlib
import json
from typing import Any

from fedpool.messages import ClientJob

FORMAT = "fedpool job 1"
"""Part of what is hashed, so that no other text of fedpool has the same digest."""

COVERED = (
    "bundle_sha256",
    "entry",
    "imports",
    "arguments",
    "site_arguments",
    "config",
    "site_config",
    "transfer",
    "exclude",
    "filters",
    "filter_code",
)
"""The fields of a `ClientJob` that the digest covers."""

NOT_COVERED = ("job_id", "total_rounds", "restarts", "seed", "threads", "initial")
"""Its other fields: they identify a run, or say how often and with which numbers the code runs."""


def covered(job: ClientJob) -> dict[str, Any]:
    """What the digest covers, as a JSON object; fields that are left out of a message are null or
    empty.
    """
    fields = job.model_dump(mode="json", include=set(COVERED))
    return {"format": FORMAT, **{name: fields.get(name, _absent(job, name)) for name in COVERED}}


def job_digest(job: ClientJob) -> str:
    """The sha256, in hex, of `covered` as JSON: ASCII, keys sorted, no spaces.

    It is a pure function of the job. tests/test_job_digest.py has test vectors.
    """
    text = json.dumps(covered(job), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _absent(job: ClientJob, name: str) -> Any:
    value = getattr(job, name)
    return list(value) if isinstance(value, tuple) else value
