"""The JSON that the coordinator writes: it has one byte form, and unknown content is refused."""

import json
from typing import Any

import pytest

from fedpool.errors import IntegrityError
from fedpool.store import to_json
from fedpool.tasks.job_record import JobRecord, JobResult
from fedpool.tasks.record import RoundRecord
from tests.records import job_of, record_of, result_of

WRITTEN = (record_of({"accepted": [{"norm": 2.0, "scale": 0.5}], "failed": [{}]}), job_of({}), result_of({}))


@pytest.mark.parametrize("value", WRITTEN, ids=lambda value: type(value).__name__)
def test_what_was_written_is_read_back(value: RoundRecord | JobRecord | JobResult) -> None:
    again = type(value).from_bytes(value.to_bytes(), "here")
    assert again == value and again.to_bytes() == value.to_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "folder/round.json does not describe a round: more: Extra inputs are not permitted"),
        ({"task": "sleep"}, "folder/round.json does not describe a round: task: Input should be 'train', "),
        ({"accepted": [{}]}, r"folder/round.json does not describe a round: accepted\.0\.site: Field required"),
        ({"metrics": {"loss": "low"}}, r"does not describe a round: metrics\.loss: Input should be a valid number"),
    ],
)
def test_what_is_of_another_kind_is_named_by_its_place(change: dict[str, Any], message: str) -> None:
    data = to_json({**record_of({}).as_json(), **change})
    with pytest.raises(IntegrityError, match=message):
        RoundRecord.from_bytes(data, "folder/round.json")


@pytest.mark.parametrize("data", [b"{", b"", b"\xff"])
def test_what_is_not_json_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"^here is not JSON: "):
        JobRecord.from_bytes(data, "here")


def test_a_number_that_is_not_finite_is_refused() -> None:
    text = json.dumps({**record_of({}).as_json(), "metrics": {"loss": float("nan")}})
    with pytest.raises(IntegrityError, match=r"metrics\.loss: Input should be a finite number"):
        RoundRecord.from_bytes(text.encode(), "here")


def test_a_job_of_a_later_version_is_refused() -> None:
    data = to_json({**job_of({}).as_json(), "arithmetic": 9})
    with pytest.raises(IntegrityError, match="arithmetic 9 is unknown: a later version of fedpool wrote this job"):
        JobRecord.from_bytes(data, "here")


def test_a_result_has_the_hash_of_the_rest_of_it() -> None:
    sealed = result_of({}).sealed()
    assert sealed.sha256 == sealed.own_sha256() != result_of({"num_rounds": 1}).own_sha256()
