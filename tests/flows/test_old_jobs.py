"""Jobs that an earlier version wrote, commit 48fad92: what they hold has the meaning that it had then, to the byte."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpool.errors import IntegrityError
from fedpool.flows.staging import check_unchanged
from fedpool.flows.stored import recipe_of
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store

ARCHIVE = Path(__file__).parent / "jobs-of-48fad92.tar.xz"
with tarfile.open(ARCHIVE) as archive:
    JOBS = sorted({name.partition("/")[0] for name in archive.getnames()})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with all of them: every aggregator and every algorithm whose arithmetic is its own, at up to eleven sites."""
    folder = tmp_path_factory.mktemp("old-jobs")
    with tarfile.open(ARCHIVE) as opened:
        opened.extractall(folder, filter="data")
    yield Store(folder)


@pytest.mark.parametrize("job_id", JOBS)
def test_it_is_verified(store: Store, job_id: str) -> None:
    verified = verify_job(store, job_id)
    assert verified.status == "COMPLETED" and verified.num_rounds >= 3


@pytest.mark.parametrize("job_id", JOBS)
def test_it_can_be_resumed_as_it_was(store: Store, job_id: str) -> None:
    sites = store.read_json(JobPaths(job_id).job)["sites"]
    check_unchanged(recipe_of(job_id, store), job_id, store, sites)


def test_a_record_that_was_changed_is_still_found_out(store: Store, tmp_path: Path) -> None:
    job_id = next(name for name in JOBS if name.startswith("krum"))
    with tarfile.open(ARCHIVE) as opened:
        opened.extractall(tmp_path, [m for m in opened if m.name.startswith(job_id)], filter="data")
    path = tmp_path / JobPaths(job_id).record(0)
    record = json.loads(path.read_text())
    record["accepted"][0]["weight"] += 1
    path.chmod(0o644)
    path.write_text(json.dumps(record, indent=2, sort_keys=True))
    with pytest.raises(IntegrityError, match=r"round\.json"):
        verify_job(Store(tmp_path), job_id)
