"""Verifies the updates of a job: each passes the gate again, as far as it was kept."""

import hashlib
from dataclasses import replace

from fedpool.errors import IntegrityError
from fedpool.flows.verify_errors import differs
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery, read_delivery
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks import gate
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Probed, Rejected
from fedpool.tasks.record import AcceptedEntry, Entry, ProbedEntry, RejectedEntry
from fedpool.tasks.retention import KeepUpdates


class UpdateAudit:
    """Judges the updates of a job again.

    Attributes:
        num_updates: number of updates that were judged.
        num_pruned: number of those that were not kept, so only their manifests were judged.
    """

    def __init__(self, store: Store, job_id: str, keep_updates: KeepUpdates) -> None:
        self._store = store
        self._paths = JobPaths(job_id)
        self._keep_updates = keep_updates
        self.num_updates = self.num_pruned = 0

    def passed(self, number: int, entry: AcceptedEntry | ProbedEntry, wanted: Expected) -> Accepted | Probed:
        """Judge an update again that was accepted, or only not because of its site's quarantine.

        Raises:
            IntegrityError: it should be rejected.
        """
        outcome = self.judge(number, entry, wanted)
        if isinstance(outcome, Rejected):
            what = self._paths.update if outcome.manifest else self._paths.manifest
            path = what(number, entry.site, entry.attempt)
            how = f"was accepted, but should have been rejected ({outcome.code}): {outcome.reason}"
            raise differs(self._store, path, how)
        return Probed(outcome) if isinstance(entry, ProbedEntry) else outcome

    def judge(self, number: int, entry: AcceptedEntry | ProbedEntry, wanted: Expected) -> Accepted | Rejected:
        """Judge an accepted update again."""
        site, attempt = entry.site, entry.attempt
        delivery = self._delivered(number, entry)
        if isinstance(delivery, Rejected):
            return delivery
        if entry.sha256 is not None and self._was_pruned(number, site, attempt):
            self.num_pruned += 1
            norm, scale = (entry.norm, entry.scale) if isinstance(entry, AcceptedEntry) else (None, None)
            return gate.judge_manifest(site, attempt, delivery, wanted, norm, 1.0 if scale is None else scale)
        return gate.judge(self._store, site, attempt, delivery, wanted)

    def judge_rejected(self, number: int, entry: RejectedEntry, wanted: Expected) -> Accepted | Rejected:
        """Judge a rejected update again. The code of the rejection counts; its reason is text for
        people, whose wording differs between versions.
        """
        outcome = self._rejected_again(number, entry, wanted)
        if isinstance(outcome, Rejected) and outcome.code == entry.code:
            return replace(outcome, reason=entry.reason)
        return outcome

    def _rejected_again(self, number: int, entry: RejectedEntry, wanted: Expected) -> Accepted | Rejected:
        site, attempt = entry.site, entry.attempt
        delivery = self._delivered(number, entry)
        if isinstance(delivery, Rejected):
            return delivery
        if entry.code == "changed":  # can't be repeated: the bytes that the gate saw are gone
            return Rejected(site, attempt, delivery.manifest, delivery.manifest_sha256, entry.code, entry.reason)
        return gate.judge(self._store, site, attempt, delivery, wanted)

    def _delivered(self, number: int, entry: Entry) -> Delivery | Rejected:
        """The delivery of a site, or a rejection if its manifest can't be read."""
        site, attempt = entry.site, entry.attempt
        self.num_updates += 1
        try:
            delivery = read_delivery(self._store, self._paths.job_id, number, site, attempt)
        except FileNotFoundError:
            raise differs(self._store, self._paths.manifest(number, site, attempt), "is missing") from None
        except IntegrityError as error:
            return Rejected(site, attempt, None, None, "manifest", storable(str(error)))
        self._verify_assignment(number, site, attempt, delivery.manifest.assignment_sha256)
        return delivery

    def _was_pruned(self, number: int, site: str, attempt: int) -> bool:
        """Whether an update is missing because the recipe doesn't keep it or the job was pruned."""
        allowed = self._keep_updates != "all" or self._store.exists(self._paths.pruned)
        return allowed and not self._store.exists(self._paths.update(number, site, attempt))

    def _verify_assignment(self, number: int, site: str, attempt: int, sha256: str) -> None:
        """Check the site's assignment, if it is stored, against the hash in the site's manifest."""
        path = self._paths.assignment(number, site, attempt)
        if self._store.exists(path) and hashlib.sha256(self._store.read_bytes(path)).hexdigest() != sha256:
            raise differs(self._store, path, "does not match the assignment that the site says it got")
