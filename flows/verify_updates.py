"""Updates of a job that is verified: each passes the gate again, as far as it was kept."""

import hashlib

from fedpool.errors import IntegrityError
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery, read_delivery
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks import gate
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Probed, Rejected
from fedpool.tasks.record import AcceptedEntry, Entry, ProbedEntry, RejectedEntry
from fedpool.tasks.retention import KeepUpdates


def differs(store: Store, path: str, how: str) -> IntegrityError:
    """The error that something in the store is not what it says."""
    return IntegrityError(f"{store.full(path)} {how}")


class UpdateAudit:
    """Judges the updates of a job anew.

    Attributes:
        num_updates: that were judged.
        num_pruned: those of them that were not kept, and of which only the manifest was judged.
    """

    def __init__(self, store: Store, job_id: str, keep_updates: KeepUpdates) -> None:
        self._store = store
        self._paths = JobPaths(job_id)
        self._keep_updates = keep_updates
        self.num_updates = self.num_pruned = 0

    def passed(self, number: int, entry: AcceptedEntry | ProbedEntry, wanted: Expected) -> Accepted | Probed:
        """An update that was accepted, or would have been but for the quarantine of its site,
        judged anew.

        Raises:
            IntegrityError: it is to be rejected.
        """
        outcome = self.judge(number, entry, wanted)
        if isinstance(outcome, Rejected):
            what = self._paths.update if outcome.manifest else self._paths.manifest
            path = what(number, entry.site, entry.attempt)
            how = f"was accepted, but should have been rejected ({outcome.code}): {outcome.reason}"
            raise differs(self._store, path, how)
        return Probed(outcome) if isinstance(entry, ProbedEntry) else outcome

    def judge(self, number: int, entry: AcceptedEntry | ProbedEntry, wanted: Expected) -> Accepted | Rejected:
        """An update that was accepted, judged anew."""
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
        """An update that was rejected, judged anew."""
        site, attempt = entry.site, entry.attempt
        delivery = self._delivered(number, entry)
        if isinstance(delivery, Rejected):
            return delivery
        if entry.code == "changed":  # which is over: what the gate had seen is not there any more
            return Rejected(site, attempt, delivery.manifest, delivery.manifest_sha256, entry.code, entry.reason)
        return gate.judge(self._store, site, attempt, delivery, wanted)

    def _delivered(self, number: int, entry: Entry) -> Delivery | Rejected:
        """What a site sent; or that it cannot be read."""
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
        """Whether an update is missing by the word of the recipe, or of whoever pruned the job."""
        allowed = self._keep_updates != "all" or self._store.exists(self._paths.pruned)
        return allowed and not self._store.exists(self._paths.update(number, site, attempt))

    def _verify_assignment(self, number: int, site: str, attempt: int, sha256: str) -> None:
        """Check what the site was asked, where it is in the store, against what it says that it
        was asked.
        """
        path = self._paths.assignment(number, site, attempt)
        if self._store.exists(path) and hashlib.sha256(self._store.read_bytes(path)).hexdigest() != sha256:
            raise differs(self._store, path, "does not match what the site says it was asked")
