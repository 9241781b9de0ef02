"""The ledger: what a job has committed, advanced by committing, resuming or verifying a round."""

from typing import Any

import pytest

from fedpool.errors import IntegrityError
from fedpool.tasks.ledger import Ledger
from fedpool.tasks.record import RoundRecord
from fedpool.tensors import Digest
from tests.records import job_of, record_of

LEDGER = Ledger.of(job_of({}), "0" * 64)
MODEL: dict[str, Any] = {"sha256": "1" * 64, "size": 11}
STATE: dict[str, Any] = {"sha256": "2" * 64, "size": 12}


def after(ledger: Ledger, **said: Any) -> RoundRecord:
    return record_of({"round": ledger.number, "previous_sha256": ledger.sha256, **said})


def test_a_ledger_begins_with_the_initial_model() -> None:
    assert (LEDGER.number, LEDGER.num_trained, LEDGER.head, LEDGER.state) == (0, 0, LEDGER.job.model, None)


def test_a_training_round_brings_the_next_model_and_state() -> None:
    record = after(LEDGER, next_global=MODEL, state=STATE)
    ledger = LEDGER.advance(record, "a" * 64)
    assert (ledger.head, ledger.state) == (Digest(**MODEL), Digest(**STATE))
    assert (ledger.records, ledger.sha256, ledger.num_trained) == ((record,), "a" * 64, 1)
    assert LEDGER.records == ()  # a ledger is a value: the one before is unchanged


def test_an_evaluation_leaves_model_and_state() -> None:
    trained = LEDGER.advance(after(LEDGER, next_global=MODEL, state=STATE), "a" * 64)
    ledger = trained.advance(after(trained, task="evaluate"), "b" * 64)
    assert (ledger.head, ledger.state, ledger.num_trained, ledger.number) == (trained.head, trained.state, 1, 2)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"round": 1}, "says round 1, but it should be 0"),
        ({"job_id": "other"}, "says job_id other, but it should be job-1"),
        ({"previous_sha256": "f" * 64}, f"says previous_sha256 {'f' * 64}, but it should be {'0' * 64}"),
    ],
)
def test_a_record_of_another_job_round_or_history_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        LEDGER.advance(after(LEDGER, **said), "a" * 64)
