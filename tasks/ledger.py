"""The ledger of a job: what is committed, as a frozen value. Whoever commits, takes up or
verifies a round advances it.
"""

from dataclasses import dataclass, replace
from typing import Self

from fedpool.errors import IntegrityError
from fedpool.tasks.job_record import JobRecord
from fedpool.tasks.record import RoundRecord, num_trained
from fedpool.tensors import Digest


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a job has committed.

    Attributes:
        job: its description.
        sha256: hash of the newest `round.json`; before the first, of `job.json`.
        head: the newest global model.
        state: what the strategy carries into the next round, if anything.
        records: of all rounds.
    """

    job: JobRecord
    sha256: str
    head: Digest
    state: Digest | None = None
    records: tuple[RoundRecord, ...] = ()

    @classmethod
    def of(cls, job: JobRecord, sha256: str) -> Self:
        """The ledger of a job that has committed nothing yet.

        Args:
            sha256: of its `job.json`.
        """
        return cls(job, sha256, job.model)

    @property
    def number(self) -> int:
        """Of the round that comes next."""
        return len(self.records)

    @property
    def num_trained(self) -> int:
        """How many rounds trained."""
        return num_trained(self.records)

    def advance(self, record: RoundRecord, sha256: str) -> Self:
        """The ledger with one round more.

        Args:
            sha256: of its record.

        Raises:
            IntegrityError: it is not the record of the round that comes next.
        """
        for what, found, wanted in (
            ("job_id", record.job_id, self.job.job_id),
            ("round", record.round, self.number),
            ("previous_sha256", record.previous_sha256, self.sha256),
        ):
            if found != wanted:
                raise IntegrityError(f"says {what} {found}, but it should be {wanted}")
        if record.next_global is None:  # an evaluation: the model stays, and what the strategy carries
            return replace(self, sha256=sha256, records=(*self.records, record))
        return replace(
            self, sha256=sha256, head=record.next_global, state=record.state, records=(*self.records, record)
        )
