"""What a site is asked and sends, for tests of what is done with it."""

from typing import Any

from fedpool.messages import ClientJob, UpdateManifest

SENT: dict[str, Any] = {
    "job_id": "job-1",
    "round": 0,
    "task": "train",
    "base_sha256": "b" * 64,
    "assignment_sha256": "a" * 64,
    "params_type": "FULL",
    "seconds": 1.0,
}
"""The fields of an honest update, but for its site and its file."""


def sent_by(site: str, **fields: Any) -> UpdateManifest:
    """The manifest of an honest update of a site, with what a test says of it."""
    return UpdateManifest(**SENT | {"site": site} | fields)


JOB: dict[str, Any] = {
    "job_id": "job-1",
    "total_rounds": 1,
    "entry": "client.py",
    "bundle_sha256": "0" * 64,
    "imports": (),
    "arguments": (),
    "site_arguments": {},
    "config": {},
    "site_config": {},
    "transfer": "FULL",
    "exclude": (),
    "restarts": 0,
    "seed": 0,
    "threads": 1,
}
"""The fields of the plainest job, as a site sees them."""


def client_job(**fields: Any) -> ClientJob:
    """The plainest job, with what a test says of it."""
    return ClientJob(**JOB | fields)
