"""Verifies a job's record from its first byte to its last, without trusting anybody.

Everything is read anew: the bundle, the models, the chain of the rounds' records, and every update,
which passes the gate again. Every aggregate is recomputed from the stored updates, and must come
out the same to the byte; a model that was scored across sites must be the one that its owner
submitted. Every round must be the one that had to follow on those before it.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedpool.allowed_code import Permission, by_environment
from fedpool.checked import CheckedTensors
from fedpool.errors import IntegrityError, RecipeError, RoundError
from fedpool.filters import described
from fedpool.flows.expected import expected
from fedpool.flows.plan import Step, next_step, unscored_best
from fedpool.flows.stored import recipe_of
from fedpool.flows.verify_errors import differs, says_otherwise
from fedpool.flows.verify_late import late_again
from fedpool.flows.verify_result import verify_result
from fedpool.flows.verify_updates import UpdateAudit
from fedpool.inspection import not_finite_names
from fedpool.paths import JobPaths
from fedpool.refusals import explained
from fedpool.store import Store
from fedpool.tasks.aggregate import Aggregated, Before, aggregate
from fedpool.tasks.committed import Committed
from fedpool.tasks.gate import Accepted, Failed, Late, Outcome
from fedpool.tasks.guarded import strategy_of
from fedpool.tasks.job_record import JobRecord
from fedpool.tasks.ledger import Ledger
from fedpool.tasks.publish import model_entry, submitted_digest
from fedpool.tasks.record import RoundRecord, SubmittedModel, known_weights
from fedpool.tasks.recording import round_record
from fedpool.tasks.used import Counted
from fedpool.tasks.virtual_time import Schedule, contradiction, units_of
from fedpool.tensors import Digest, Tensors, blocks_of


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of a verification.

    Attributes:
        num_rounds: committed rounds, including the evaluation of the last model.
        num_updates: updates that the rounds' records name, accepted or rejected.
        num_pruned: those that were not kept: only their hashes are there, so their aggregate is
            taken on trust.
        status: how the job ended; None if it has no result yet.
    """

    num_rounds: int
    num_updates: int
    num_pruned: int
    status: str | None


def verify_job(store: Store, job_id: str, *, allow: Permission = by_environment) -> Verified:
    """Verify everything that the store holds of a job.

    Args:
        allow: called before running code that came with the job; see `recipe_of`.

    Raises:
        ConfigError: that code may not be run, or can't be imported in this process.
        IntegrityError: an object is wrong; the message names the first such object, and how it
            differs.
        FileNotFoundError: the job doesn't exist.
    """
    return _Audit(store, job_id, allow).run()


class _Audit:
    def __init__(self, store: Store, job_id: str, allow: Permission) -> None:
        self._store = store
        self._paths = JobPaths(job_id)
        data = store.read_bytes(self._paths.job)
        try:
            self._recipe = recipe_of(job_id, store, allow=allow)
        except RecipeError as error:
            raise IntegrityError(f"{store.full(self._paths.job)} does not contain a valid recipe: {error}") from None
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{store.full(self._paths.job)} refers to an object that is missing: {error}"
            ) from None
        job = JobRecord.from_bytes(data, store.full(self._paths.job))
        self._ledger = Ledger.of(job, hashlib.sha256(data).hexdigest())
        self._committed = Committed(store)
        self._arithmetic = job.arithmetic
        self._holes = job.holes
        units = units_of(job.environment)
        self._schedule = None if units is None else Schedule(units)
        self._updates = UpdateAudit(store, job_id, self._recipe.keep_updates)
        self._counted = Counted(self._recipe.aggregation_weights)
        self._strategy = strategy_of(self._recipe, len(job.sites))

    def run(self) -> Verified:
        with explained(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="fedpool-verify-") as folder:
            while self._store.exists(path := self._paths.record(self._ledger.number)):
                self._verify_round(path, Path(folder))
            self._verify_model(self._ledger.num_trained, self._ledger.head)
        status = verify_result(self._recipe, self._store, self._paths, self._ledger)
        return Verified(self._ledger.number, self._updates.num_updates, self._updates.num_pruned, status)

    def _verify_round(self, path: str, folder: Path) -> None:
        number = self._ledger.number
        data = self._store.read_bytes(path)
        record = RoundRecord.from_bytes(data, self._store.full(path))
        step, _ = next_step(self._recipe, self._ledger.records)
        if step is None:
            raise self._differs(path, "belongs to a round that should not exist: the job had already ended")
        base = self._verify_model(number, step.model or self._ledger.head)
        if number == 0 and self._holes not in (
            None,
            holes := frozenset(not_finite_names(base, self._store.block_elements)),
        ):
            raise self._differs(
                self._paths.job, f"says holes {sorted(self._holes or ())}, but it should be {sorted(holes)}"
            )
        says, follows = record.as_json(), self._rebuilt(number, step, record, base, folder).as_json()
        for name in sorted(says.keys() | follows.keys()):
            if (said := says.get(name)) != (found := follows.get(name)):
                raise says_otherwise(self._store, path, name, said=said, found=found)
        if (against := contradiction(self._schedule, record)) is not None:
            raise self._differs(path, against)
        if self._schedule is not None:
            self._schedule = self._schedule.follow(record)
        if record.to_bytes() != data:
            raise self._differs(path, "is not in the form in which records are written")
        self._ledger = self._ledger.advance(record, hashlib.sha256(data).hexdigest())

    def _rebuilt(self, number: int, step: Step, record: RoundRecord, base: Tensors, folder: Path) -> RoundRecord:
        """The record that follows from the other objects in the store."""
        recipe, job_id, head = self._recipe, self._paths.job_id, step.model or self._ledger.head
        wanted = expected(recipe, self._strategy, job_id, number, step.task, head, base, self._holes, self._arithmetic)
        outcomes: list[Outcome] = [
            Failed(entry.site, entry.attempt, entry.cause, entry.away) for entry in record.failed
        ]
        outcomes += [Late(entry.site, entry.attempt) for entry in record.late]
        outcomes += [self._updates.judge_rejected(number, entry, wanted) for entry in record.rejected]
        outcomes += [self._updates.passed(number, entry, wanted) for entry in record.accepted]
        outcomes += [self._updates.passed(number, entry, wanted) for entry in record.probed]
        accepted = [outcome for outcome in outcomes if isinstance(outcome, Accepted)]
        known = (recipe, self._strategy, self._store, self._committed, self._ledger)
        arrivals = late_again(*known, record, self._updates) if step.task == "train" else []
        counted = accepted + [came.outcome for came in arrivals if isinstance(came.outcome, Accepted)]
        following = self._following(number, base, counted, record, folder) if step.task == "train" else None
        models = self._submitted(base, accepted, record) if step.task == "submit_model" else None
        return round_record(
            job_id=job_id,
            round=number,
            task=step.task,
            outcomes=outcomes,
            arrivals=arrivals,
            not_asked={entry.site: entry.reason for entry in record.not_asked},
            known_weights=known_weights(self._ledger.records),
            owner=step.owner,
            origin=step.origin,
            base=head,
            following=following.model if following else None,
            state=following.state if following else None,
            models=models,
            previous_sha256=self._ledger.sha256,
            virtual_time=record.virtual_time,
            timings=record.timings,
            arithmetic=self._arithmetic,
            filters=described(wanted.filters),
        )

    def _following(
        self, number: int, base: Tensors, accepted: list[Accepted], record: RoundRecord, folder: Path
    ) -> Aggregated:
        """Recompute a round's results and compare them with the store; returns their digests."""
        if record.next_global is None:
            raise self._differs(self._paths.record(number), "says that it trained, but names no resulting model")
        said = Aggregated(record.next_global, record.state)
        if said.state and (self._updates.num_pruned == 0 or self._store.exists(self._paths.state(number))):
            self._reader(self._paths.state(number), said.state)
        if any(update.tensors is None for update in accepted):  # not all of them were kept
            return said
        scratch = Store(folder)
        scratch.block_elements = self._store.block_elements  # those of the checked updates and models
        target, state_target = f"model-{number}.safetensors", f"state-{number}.safetensors"
        state = self._carried(number)
        self._counted.follow(self._ledger.records)
        try:
            found = aggregate(
                self._strategy,
                store=scratch,
                before=Before(
                    base,
                    state,
                    number,
                    holes=self._holes or frozenset(),
                    weights=dict(self._counted.first_weights),
                ),
                updates=accepted,
                factors=self._recipe.aggregation_weights,
                target=target,
                state_target=state_target,
                arithmetic=self._arithmetic,
            )
        except RoundError as error:
            raise self._differs(self._paths.record(number), f"cannot be right: {error}") from None
        for path, here, is_there, wanted in (
            (self._paths.global_model(number + 1), target, found.model, said.model),
            (self._paths.state(number), state_target, found.state, said.state),
        ):
            if is_there != wanted and is_there and wanted:
                name = _first_difference(scratch.tensors(here, is_there.size), self._reader(path, wanted))
                raise self._differs(path, f"does not follow from round {number}'s updates: {name} differs")
            if is_there:
                (folder / here).unlink()
        return found

    def _carried(self, number: int) -> Tensors | None:
        """The strategy's state at the start of a round."""
        state = self._ledger.state
        return self._reader(self._paths.state(number - 1), state) if state else None

    def _submitted(self, base: Tensors, accepted: list[Accepted], record: RoundRecord) -> list[SubmittedModel]:
        """The models that the following rounds score, from the sites' submissions."""
        best = unscored_best(self._recipe, self._ledger.records, self._ledger.job.sites)
        said = {model.owner: model.digest for model in record.models or ()}
        models = [] if best is None else [best]
        for update in self._arithmetic.by_site(accepted, lambda update: update.site):
            if update.manifest.params_type is None:  # the site has no model of its own
                continue
            if update.tensors is None:  # it was not kept
                if update.site not in said:
                    raise self._differs(
                        self._paths.record(record.round), f"names no model of {update.site}, which submitted one"
                    )
                digest = said[update.site]
            else:
                digest = submitted_digest(base, update.tensors, self._store.block_elements)
            models.append(model_entry(update, digest))
        return models

    def _verify_model(self, number: int, digest: Digest) -> CheckedTensors:
        return self._reader(self._paths.global_model(number), digest)

    def _reader(self, path: str, digest: Digest) -> CheckedTensors:
        return self._committed.checked(path, digest)

    def _differs(self, path: str, how: str) -> IntegrityError:
        return differs(self._store, path, how)


def _first_difference(one: Tensors, other: Tensors) -> str:
    if one.spec != other.spec:
        return "its names and shapes"
    for name, start, stop in blocks_of(one.spec, 1 << 20):
        if one.read_block(name, start, stop) != other.read_block(name, start, stop):
            return name
    return "the order of its bytes"
