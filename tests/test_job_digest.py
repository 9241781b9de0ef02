"""The digest of what a job makes its sites run: test vectors, and what it covers."""

import json
from typing import Any

import pytest

from fedpool.job_digest import COVERED, NOT_COVERED, covered, job_digest
from fedpool.messages import ClientJob
from tests.updates import client_job

VECTORS: list[tuple[dict[str, Any], str]] = [
    ({}, "3d51cafb4b9711021861d8433708ed78a681ac70a56c712282ac0dbbee73da2e"),
    (
        {
            "entry": "apps/train.py",
            "imports": ("numpy", "torch.nn"),
            "arguments": ("--lr", "0.1"),
            "site_arguments": {"b": (), "a": ("--lr", "0.2")},
            "config": {"ünï": [1, 2.5, None, True], "n": 1e300},
            "site_config": {"a": {"data": "/d"}},
            "transfer": "DIFF",
            "exclude": ("head.*",),
            "filters": ({"type": "Clip", "norm": 1.0},),
            "filter_code": {"sha256": "c" * 64, "modules": ("clip",)},
        },
        "b5bce0fc02744645b1a0d1bbe15ab54db67fb8793706e8b5c37ec4ac81f016a4",
    ),
]
OTHER: dict[str, Any] = {
    "bundle_sha256": "b" * 64,
    "entry": "other.py",
    "imports": ("other",),
    "arguments": ("other",),
    "site_arguments": {"site-1": ("other",)},
    "config": {"other": 1},
    "site_config": {"site-1": {"other": 1}},
    "transfer": "DIFF",
    "exclude": ("other",),
    "filters": ({"type": "Other"},),
    "filter_code": {"sha256": "d" * 64, "modules": ("other",)},
    "job_id": "other",
    "total_rounds": 77,
    "restarts": 7,
    "seed": 77,
    "threads": 7,
    "initial": {"sha256": "e" * 64, "size": 7},
}


@pytest.mark.parametrize(("fields", "digest"), VECTORS)
def test_the_digest_is_the_same_in_every_version(fields: dict[str, Any], digest: str) -> None:
    assert job_digest(client_job(bundle_sha256="a" * 64, **fields)) == digest


def test_the_digest_is_that_of_canonical_json() -> None:
    assert covered(client_job(bundle_sha256="a" * 64)) == {
        "format": "fedpool job 1",
        "bundle_sha256": "a" * 64,
        "entry": "client.py",
        "imports": [],
        "arguments": [],
        "site_arguments": {},
        "config": {},
        "site_config": {},
        "transfer": "FULL",
        "exclude": [],
        "filters": [],
        "filter_code": None,
    }


def test_every_field_of_a_clients_job_is_either_covered_or_known_not_to_be() -> None:
    assert sorted((*COVERED, *NOT_COVERED)) == sorted(ClientJob.model_fields) == sorted(OTHER)


@pytest.mark.parametrize("field", OTHER)
def test_the_digest_changes_exactly_with_what_it_covers(field: str) -> None:
    plain = job_digest(client_job())
    changed = job_digest(client_job(**{field: OTHER[field]}))
    assert (changed != plain) == (field in COVERED)


def test_a_job_has_the_same_digest_after_it_was_stored() -> None:
    job = client_job(**VECTORS[1][0], bundle_sha256="a" * 64)
    stored = json.loads(json.dumps(job.model_dump(mode="json")))
    assert job_digest(ClientJob.model_validate(stored, strict=False)) == job_digest(job)


@pytest.mark.parametrize(
    "entry", ["/etc/passwd", "../client.py", "a/../../b.py", "a\\b.py", "", ".", "a/", "./a.py", "a\0"]
)
def test_a_script_outside_its_bundle_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a file inside its bundle"):
        client_job(entry=entry)


@pytest.mark.parametrize("name", ["os; import x", "/tmp/x", "a..b", "a-b", "a/b"])
def test_an_import_that_is_no_module_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not the dotted name of a module"):
        client_job(imports=(name,))
