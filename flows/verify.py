"""Verification of a job's record: from its first byte to its last, as somebody does it who trusts nobody.

Everything is read anew: the bundle, the models, the chain of the rounds' records, and every update, which passes the gate again.
Every aggregate is recomputed from the stored updates, and must come out the same to the byte; a model that was scored across
sites must be the one that its owner submitted. Every round must be the one that had to follow on those before it.
"""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpool.arrays import not_finite_names
from fedpool.errors import IntegrityError, RecipeError, RoundError
from fedpool.flows.expected import expected
from fedpool.flows.plan import Step, best_model, next_step, unscored_best
from fedpool.flows.staging import sha256_without
from fedpool.flows.stored import recipe_of
from fedpool.paths import JobPaths
from fedpool.refusals import explained
from fedpool.sites.site_round import read_delivery
from fedpool.storable import storable
from fedpool.store import Store, check_digest, to_json
from fedpool.tasks.aggregate import Aggregated, Before, aggregate
from fedpool.tasks.arithmetic import arithmetic_of
from fedpool.tasks.causes import evaluation_error
from fedpool.tasks.gate import Accepted, Expected, Failed, Late, Outcome, Probed, Rejected, judge, judge_manifest
from fedpool.tasks.holes import stored_holes
from fedpool.tasks.matrix import cross_site_matrix
from fedpool.tasks.publish import model_entry, submitted_digest
from fedpool.tasks.record import Record, known_weights, num_trained, round_record
from fedpool.tasks.strategy import Strategy
from fedpool.tasks.used import Counted
from fedpool.tensors import Digest, TensorReader


@dataclass(frozen=True, slots=True)
class Verified:
    """What was verified of a job.

    Attributes:
        num_rounds: committed rounds, the evaluation of the last model included.
        num_updates: updates that the rounds' records name, accepted or rejected.
        num_pruned: those of them that were not kept: their hashes are there, and what was made of them is taken on trust.
        status: how the job ended; None when it has no result yet.
    """

    num_rounds: int
    num_updates: int
    num_pruned: int
    status: str | None


def verify_job(store: Store, job_id: str) -> Verified:
    """Verify all that the store holds of a job.

    Raises:
        IntegrityError: something is not what it says; the message names the first such object, and how it differs.
        FileNotFoundError: there is no such job.
    """
    return _Audit(store, job_id).run()


class _Audit:
    def __init__(self, store: Store, job_id: str) -> None:
        self._store = store
        self._paths = JobPaths(job_id)
        self._records: list[Record] = []
        self._num_updates = self._num_pruned = 0
        job = store.read_json(self._paths.job)
        try:
            self._recipe = recipe_of(job_id, store)
        except RecipeError as error:
            raise IntegrityError(f"{store.full(self._paths.job)} has a recipe that is not one: {error}") from None
        except FileNotFoundError as error:
            raise IntegrityError(f"{store.full(self._paths.job)} names what is not there: {error}") from None
        self._sites = job["sites"]
        self._arithmetic = arithmetic_of(job)
        self._holes = stored_holes(job)
        self._counted = Counted(self._recipe.aggregation_weights)
        self._strategy: Strategy = self._recipe.strategy(len(self._sites))
        self._state: Digest | None = None
        """What the strategy carries into the next round, by the word of the newest record."""
        self._head: Digest = Digest(**job["model"])
        """The newest global model, by the word of what came before it."""
        self._previous = hashlib.sha256(store.read_bytes(self._paths.job)).hexdigest()

    def run(self) -> Verified:
        with explained(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="fedpool-verify-") as folder:
            while self._store.exists(path := self._paths.record(len(self._records))):
                self._verify_round(path, Path(folder))
            self._verify_model(num_trained(self._records), self._head)
        status = self._verify_result()
        return Verified(len(self._records), self._num_updates, self._num_pruned, status)

    def _verify_round(self, path: str, folder: Path) -> None:
        number = len(self._records)
        data = self._store.read_bytes(path)
        try:
            record = json.loads(data)
        except ValueError as error:
            raise self._differs(path, f"is no JSON: {error}") from None
        step, _ = next_step(self._recipe, self._records)
        if step is None:
            raise self._differs(path, "is of a round that had not to follow: the job was at its end")
        base = self._verify_model(number, step.model or self._head)
        if number == 0 and self._holes not in (
            None,
            holes := frozenset(not_finite_names(base, self._store.block_elements)),
        ):
            raise self._differs(
                self._paths.job, f"says holes {sorted(self._holes or ())}, but {sorted(holes)} is what follows"
            )
        try:
            rebuilt = self._rebuilt(number, step, record, base, folder)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._differs(path, f"does not describe a round: {type(error).__name__}: {error}") from None
        for name in sorted(record.keys() | rebuilt.keys()):
            if (said := record.get(name)) != (found := rebuilt.get(name)):
                raise self._differs(path, f"says {name} {_brief(said)}, but {_brief(found)} is what follows")
        if to_json(record) != data:
            raise self._differs(path, "is not in the form that records are written in")
        self._records.append(record)
        self._previous = hashlib.sha256(data).hexdigest()
        if record["next_global"]:
            self._head = Digest(**record["next_global"])
            self._state = Digest(**record["state"]) if record["state"] else None

    def _rebuilt(self, number: int, step: Step, record: Record, base: TensorReader, folder: Path) -> dict[str, Any]:
        """The record as it follows from what else is in the store."""
        recipe, job_id, head = self._recipe, self._paths.job_id, step.model or self._head
        wanted = expected(recipe, self._strategy, job_id, number, step.task, head, base, self._holes, self._arithmetic)
        outcomes: list[Outcome] = [Failed(**entry) for entry in record["failed"]]
        outcomes += [Late(**entry) for entry in record["late"]]
        for entry in record["rejected"]:
            outcomes.append(self._judged(number, entry, wanted))
        for entry in (*record["accepted"], *record["probed"]):
            outcome = self._judged(number, entry, wanted)
            if isinstance(outcome, Rejected):
                what = self._paths.update if outcome.manifest else self._paths.manifest
                path = what(number, entry["site"], entry["attempt"])
                raise self._differs(path, f"was accepted, but is to be rejected ({outcome.code}): {outcome.reason}")
            outcomes.append(Probed(outcome) if entry in record["probed"] else outcome)
        accepted = [outcome for outcome in outcomes if isinstance(outcome, Accepted)]
        following = self._following(number, base, accepted, record, folder) if step.task == "train" else None
        models = self._submitted(base, accepted, record) if step.task == "submit_model" else None
        return round_record(
            job_id=job_id,
            round=number,
            task=step.task,
            outcomes=outcomes,
            not_asked={entry["site"]: entry["reason"] for entry in record.get("not_asked", ())},
            known_weights=known_weights(self._records),
            owner=step.owner,
            origin=step.origin,
            base=head,
            following=following.model if following else None,
            state=following.state if following else None,
            models=models,
            previous_sha256=self._previous,
            timings=record["timings"],
            arithmetic=self._arithmetic,
        )

    def _judged(self, number: int, entry: Record, wanted: Expected) -> Accepted | Rejected:
        """An update, judged anew."""
        site, attempt = entry["site"], entry["attempt"]
        self._num_updates += 1
        try:
            delivery = read_delivery(self._store, self._paths.job_id, number, site, attempt)
        except FileNotFoundError:
            raise self._differs(self._paths.manifest(number, site, attempt), "is missing") from None
        except IntegrityError as error:
            return Rejected(site, attempt, None, None, "manifest", storable(str(error)))
        self._verify_assignment(number, site, attempt, delivery.manifest.assignment_sha256)
        if entry.get("code") == "changed":  # which is over: what the gate had seen is not there any more
            return Rejected(site, attempt, delivery.manifest, delivery.manifest_sha256, entry["code"], entry["reason"])
        if entry["sha256"] is not None and "reason" not in entry and self._was_pruned(number, site, attempt):
            self._num_pruned += 1
            return judge_manifest(site, attempt, delivery, wanted, entry.get("norm"), entry.get("scale", 1.0))
        return judge(self._store, site, attempt, delivery, wanted)

    def _was_pruned(self, number: int, site: str, attempt: int) -> bool:
        """Whether an update is missing by the word of the recipe, or of whoever pruned the job."""
        allowed = self._recipe.keep_updates != "all" or self._store.exists(self._paths.pruned)
        return allowed and not self._store.exists(self._paths.update(number, site, attempt))

    def _verify_assignment(self, number: int, site: str, attempt: int, sha256: str) -> None:
        """Check what the site was asked, where it is in the store, against what it says that it was asked."""
        path = self._paths.assignment(number, site, attempt)
        if self._store.exists(path) and hashlib.sha256(self._store.read_bytes(path)).hexdigest() != sha256:
            raise self._differs(path, "is not what the site says that it was asked")

    def _following(
        self, number: int, base: TensorReader, accepted: list[Accepted], record: Record, folder: Path
    ) -> Aggregated:
        """Digests of what the round came to, recomputed; compared with what is stored, tensor by tensor."""
        said = Aggregated(Digest(**record["next_global"]), Digest(**record["state"]) if record["state"] else None)
        if said.state and (self._num_pruned == 0 or self._store.exists(self._paths.state(number))):
            self._reader(self._paths.state(number), said.state)
        if any(update.tensors is None for update in accepted):  # not all of them were kept
            return said
        scratch, target, state_target = Store(folder), f"model-{number}.safetensors", f"state-{number}.safetensors"
        state = self._reader(self._paths.state(number - 1), self._state) if self._state else None
        self._counted.follow(self._records)
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
            raise self._differs(self._paths.record(number), f"cannot be: {error}") from None
        for path, here, is_there, wanted in (
            (self._paths.global_model(number + 1), target, found.model, said.model),
            (self._paths.state(number), state_target, found.state, said.state),
        ):
            if is_there != wanted and is_there and wanted:
                name = _first_difference(scratch.tensors(here, is_there.size), self._reader(path, wanted))
                raise self._differs(path, f"is not what comes of round {number}'s updates: {name} differs")
            if is_there:
                (folder / here).unlink()
        return found

    def _submitted(self, base: TensorReader, accepted: list[Accepted], record: Record) -> list[dict[str, Any]]:
        """The models that are scored in the rounds to come, by what the sites have submitted."""
        best = unscored_best(self._recipe, self._records, self._sites)
        said = {entry["owner"]: Digest(entry["sha256"], entry["size"]) for entry in record["models"]}
        models = [] if best is None else [best]
        for update in self._arithmetic.by_site(accepted, lambda update: update.site):
            if update.manifest.params_type is None:  # the site has no model of its own
                continue
            if update.tensors is None:  # it was not kept
                digest = said[update.site]
            else:
                digest = submitted_digest(base, update.tensors, self._store.block_elements)
            models.append(model_entry(update, digest))
        return models

    def _verify_model(self, number: int, digest: Digest) -> TensorReader:
        return self._reader(self._paths.global_model(number), digest)

    def _reader(self, path: str, digest: Digest) -> TensorReader:
        try:
            with self._store.open(path) as file:
                check_digest(file, digest, where=self._store.full(path))
        except FileNotFoundError:
            raise self._differs(path, "is missing") from None
        return self._store.tensors(path, digest.size)

    def _verify_result(self) -> str | None:
        path = self._paths.result
        if not self._store.exists(path):
            return None
        result = self._store.read_json(path)
        follows = {
            "sha256": sha256_without(result),
            "job_id": self._paths.job_id,
            "num_rounds": num_trained(self._records),
            "num_records": len(self._records),
            "last_record_sha256": self._previous,
            "cross_site": self._verify_cross_site() if result.get("status") == "COMPLETED" else None,
        }
        if "evaluation_error" in result:  # jobs of an earlier version have none
            follows["evaluation_error"] = evaluation_error(self._records)
        for name, found in follows.items():
            if result.get(name) != found:
                raise self._differs(
                    path, f"says {name} {_brief(result.get(name))}, but {_brief(found)} is what follows"
                )
        return str(result.get("status"))

    def _verify_cross_site(self) -> dict[str, Any] | None:
        """Digest of the scores across sites, as they follow from the rounds; None for a recipe that asks for none."""
        if not self._recipe.cross_site_eval:
            return None
        path = self._paths.cross_site
        follows = to_json(cross_site_matrix(self._records, best_model(self._recipe, self._records)))
        if not self._store.exists(path):
            raise self._differs(path, "is missing")
        if self._store.read_bytes(path) != follows:
            raise self._differs(path, "is not what follows from the rounds")
        return asdict(Digest(hashlib.sha256(follows).hexdigest(), len(follows)))

    def _differs(self, path: str, how: str) -> IntegrityError:
        return IntegrityError(f"{self._store.full(path)} {how}")


def _first_difference(one: TensorReader, other: TensorReader) -> str:
    if one.spec != other.spec:
        return "its names and shapes"
    for name, start, stop in one.blocks(1 << 20):
        if one.read_block(name, start, stop) != other.read_block(name, start, stop):
            return name
    return "the order of its bytes"


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
