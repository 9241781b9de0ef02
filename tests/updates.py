"""What a site sends, for tests of what is done with it."""

from typing import Any

from fedpool.messages import UpdateManifest

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
