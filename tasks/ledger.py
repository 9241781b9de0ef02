"""The ledger of a job: its committed state as a frozen value.

Committing, resuming and verifying a round all advance it.
"""

from dataclasses import dataclass, replace
from typing import Self

from fedpool.errors import IntegrityError
from fedpool.tasks.job_record import JobRecord
from fedpool.tasks.record import RoundRecord, num_trained
from fedpool.tensors import Digest


@dataclass(frozen=True, slots=True)
class Ledger:
    """The committed state of a job.

    Attributes:
        job: its description.
        sha256: hash of the newest `round.json`; before the first, of `job.json`.
        head: the newest global model.
        state: the strategy's state for the next round, if any.
        records: of all rounds.
    """

    job: JobRecord
    sha256: str
    head: Digest
    state: Digest | None = None
    records: tuple[RoundRecord, ...] = ()

    @classmethod
    def of(cls, job: JobRecord, sha256: str) -> Self:
        """The ledger of a job that hasn't committed a round yet.

        Args:
            sha256: of its `job.json`.
        """
        return cls(job, sha256, job.model)

    @property
    def number(self) -> int:
        """Number of the next round."""
        return len(self.records)

    @property
    def num_trained(self) -> int:
        """Number of training rounds."""
        return num_trained(self.records)

    def advance(self, record: RoundRecord, sha256: str) -> Self:
        """The ledger after one more round.

        Args:
            sha256: of its record.

        Raises:
            IntegrityError: the record isn't that of the next round.
        """
        for what, found, wanted in (
            ("job_id", record.job_id, self.job.job_id),
            ("round", record.round, self.number),
            ("previous_sha256", record.previous_sha256, self.sha256),
        ):
            if found != wanted:
                raise IntegrityError(f"says {what} {found}, but it should be {wanted}")
        if record.next_global is None:  # an evaluation changes neither the model nor the strategy's state
            return replace(self, sha256=sha256, records=(*self.records, record))
        return replace(
            self, sha256=sha256, head=record.next_global, state=record.state, records=(*self.records, record)
        )
