"""What a site receives and sends, for tests of the code that handles it."""

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
"""The fields of an honest update, except its site and its file."""


def sent_by(site: str, **fields: Any) -> UpdateManifest:
    """The manifest of an honest update from a site, with the fields that a test sets."""
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
"""The fields of a minimal job, as a site sees them."""


def client_job(**fields: Any) -> ClientJob:
    """A minimal job, with the fields that a test sets."""
    return ClientJob(**JOB | fields)
