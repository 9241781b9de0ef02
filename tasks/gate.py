"""The gate: accepts an update, or rejects it with a reason, before it can touch the sum."""

from dataclasses import dataclass, replace

from fedpool.checked import CheckedTensors
from fedpool.errors import FilterError, IntegrityError, ModelChanged
from fedpool.filters import Passage
from fedpool.inspection import Inspection, inspect_tensors, inspect_values
from fedpool.messages import UpdateManifest
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks.claims import check_manifest, not_a_hash
from fedpool.tasks.expected import MAX_REASON, Expected, Refused
from fedpool.tasks.fits import check_finite, check_names, check_range, norm_and_scale, open_update
from fedpool.tasks.staleness import Origin, update_key
from fedpool.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Accepted:
    """An update that may touch the sum.

    Attributes:
        tensors: None if the site sent only metrics: in an evaluation, or because it has no model to
            submit.
        norm: the L2 norm of its difference to the global model, if that is limited.
        scale: the factor on the difference that keeps it within the limit.
        origin: of an update that counts in a later round than its own.
    """

    manifest: UpdateManifest
    manifest_sha256: str
    weight: float
    tensors: Tensors | None
    norm: float | None = None
    scale: float = 1.0
    origin: Origin | None = None

    @property
    def staleness(self) -> int:
        """Number of commits between its base and the round that it counts in."""
        return 0 if self.origin is None else self.origin.staleness

    @property
    def key(self) -> str:
        """Distinguishes it from the other updates of the round that it counts in."""
        return update_key(self.site, self.staleness)

    @property
    def site(self) -> str:
        """The sender. The gate has checked that no site speaks for another."""
        return self.manifest.site

    @property
    def attempt(self) -> int:
        """The attempt that it answers."""
        return self.manifest.attempt


@dataclass(frozen=True, slots=True)
class Rejected:
    """An update that was rejected, with a code for programs and a sentence for people.

    It stays in the store. `site` and `attempt` are those that were asked, whatever the manifest
    says.
    """

    site: str
    attempt: int
    manifest: UpdateManifest | None
    manifest_sha256: str | None
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A site that was asked and sent nothing, with the cause; `away` if it was unreachable."""

    site: str
    attempt: int
    cause: str
    away: bool = False


@dataclass(frozen=True, slots=True)
class Late:
    """A site that hadn't answered when the round closed. A later update stays in the store."""

    site: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Probed:
    """A good update from a site in quarantine. The next round takes the site back."""

    update: Accepted

    @property
    def site(self) -> str:
        """The sender."""
        return self.update.site

    @property
    def attempt(self) -> int:
        """The attempt that it answers."""
        return self.update.attempt


Outcome = Accepted | Rejected | Failed | Late | Probed
"""The outcome of asking a site."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A late update as judged for the round that it would count in; `round` is its own round."""

    round: int
    outcome: Accepted | Rejected | Probed


def counting_in(number: int, outcome: Accepted | Rejected, wanted: Expected) -> Accepted | Rejected:
    """An outcome of an earlier round, with its origin, for the round that it counts in.

    Args:
        wanted: the requirements that it was judged by.
    """
    if isinstance(outcome, Rejected):
        return outcome
    assert wanted.base is not None, "training starts from a model"
    return replace(outcome, origin=Origin(wanted.base, number - wanted.round))


def judge(store: Store, site: str, attempt: int, delivery: Delivery, expected: Expected) -> Accepted | Rejected:
    """Check everything about an update: sender, assignment, bytes, names, shapes, values, weight
    and norm.

    Args:
        site: the site that was asked; the manifest must name it.
        attempt: the attempt; likewise.
        delivery: the manifest as read, and what was seen of the file if it was inspected already.

    Raises:
        ModelChanged: the global model isn't the committed one.
    """
    manifest = delivery.manifest
    if expected.bounded and (wrong := not_a_hash(manifest)):  # the record would hold it
        return Rejected(site, attempt, None, delivery.manifest_sha256, "manifest", wrong)
    try:
        weight = check_manifest(site, attempt, manifest, expected)
        if expected.task == "evaluate" or (manifest.params_type is None and expected.task != "train"):
            return Accepted(manifest, delivery.manifest_sha256, weight, None)
        if manifest.params_type is None or manifest.sha256 is None:
            raise Refused("no_params", "it holds metrics but no parameters: send params in a training round")
        path = JobPaths(expected.job_id).update(expected.round, site, attempt)
        tensors, seen = _unfiltered(*_travelled(store, path, delivery, expected), site, expected, store.block_elements)
        check_finite(seen, tensors, manifest.params_type, expected, store.block_elements)
        check_range(seen, expected.spec, manifest.params_type)
        norm, scale = norm_and_scale(tensors, manifest.params_type, expected, store.block_elements)
    except Refused as refused:
        return Rejected(site, attempt, manifest, delivery.manifest_sha256, refused.code, storable(str(refused)))
    except ModelChanged:  # the fault isn't the site's
        raise
    except FilterError as error:
        return Rejected(site, attempt, manifest, delivery.manifest_sha256, "filter", storable(str(error))[:MAX_REASON])
    except IntegrityError as error:  # it was replaced while being read
        return Rejected(site, attempt, manifest, delivery.manifest_sha256, "bytes", storable(str(error))[:MAX_REASON])
    return Accepted(manifest, delivery.manifest_sha256, weight, tensors, norm, scale)


def _travelled(store: Store, path: str, delivery: Delivery, expected: Expected) -> tuple[Tensors, Inspection]:
    """An update as stored, after checking that it matches its manifest, and its inspection."""
    manifest = delivery.manifest
    tensors = open_update(store, path, manifest, expected)
    if not expected.filters:
        check_names(tensors.spec, expected.spec)
    seen = delivery.inspection or inspect_tensors(tensors, store.block_elements)
    if seen.digest.sha256 != manifest.sha256:
        raise Refused("bytes", f"it has sha256 {seen.digest.sha256}, its manifest says {manifest.sha256}")
    return CheckedTensors(tensors, lambda: seen.tags), seen


def _unfiltered(
    travelled: Tensors, seen: Inspection, site: str, expected: Expected, block_elements: int
) -> tuple[Tensors, Inspection]:
    """An update before the filters, with the model's names and shapes, and its inspection."""
    if not expected.filters:
        return travelled, seen
    assert expected.base is not None, "filters need the model"
    passage = Passage(site, expected.round, expected.seed, expected.base)
    tensors = passage.take_back(expected.filters, travelled)
    check_names(tensors.spec, expected.spec)
    return tensors, Inspection(seen.digest, *inspect_values(tensors, block_elements), seen.tags)


def judge_manifest(
    site: str, attempt: int, delivery: Delivery, expected: Expected, norm: float | None, scale: float
) -> Accepted | Rejected:
    """Check the manifest of an accepted update that is no longer kept: its sender and weight.

    Args:
        norm: of its difference, according to the round's record; likewise `scale`.
    """
    try:
        weight = check_manifest(site, attempt, delivery.manifest, expected)
    except Refused as refused:
        reason = storable(str(refused))
        return Rejected(site, attempt, delivery.manifest, delivery.manifest_sha256, refused.code, reason)
    return Accepted(delivery.manifest, delivery.manifest_sha256, weight, None, norm, scale)
