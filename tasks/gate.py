"""The gate: an update is accepted, or rejected with a reason, before it can touch the sum."""

import math
from dataclasses import dataclass

from fedpool.arrays import inspect_tensors
from fedpool.errors import IntegrityError
from fedpool.manifest import UpdateManifest
from fedpool.store import JobPaths, Store
from fedpool.tensors import Inspection, Spec, TensorReader


@dataclass(frozen=True, slots=True)
class Expected:
    """What an update has to fit."""

    job_id: str
    round: int
    task: str
    base_sha256: str
    spec: Spec
    transfer: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """An update that may touch the sum; `tensors` is None when the site sent metrics only (an evaluation)."""

    manifest: UpdateManifest
    weight: float
    tensors: TensorReader | None

    @property
    def site(self) -> str:
        """Who sent it: the gate lets nobody speak for another."""
        return self.manifest.site

    @property
    def attempt(self) -> int:
        """In which attempt."""
        return self.manifest.attempt


@dataclass(frozen=True, slots=True)
class Rejected:
    """An update that may not, with a code for programs and a sentence for people. It stays in the store.

    `site` and `attempt` are those that were asked, whatever its manifest says.
    """

    site: str
    attempt: int
    manifest: UpdateManifest | None
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A site that was asked and sent nothing, with the cause."""

    site: str
    attempt: int
    cause: str


@dataclass(frozen=True, slots=True)
class Late:
    """A site that was asked and had not answered when the round closed. What it sends after that stays in the store."""

    site: str
    attempt: int


Outcome = Accepted | Rejected | Failed | Late
"""What came of asking a site."""


class _Refused(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def judge(
    store: Store,
    site: str,
    attempt: int,
    manifest: UpdateManifest,
    expected: Expected,
    inspection: Inspection | None = None,
) -> Accepted | Rejected:
    """Check everything about an update: whom it is from, what it answers, its bytes, names, shapes, values and weight.

    Args:
        site: who was asked; the manifest must say the same.
        attempt: in which attempt; likewise.
        inspection: what this very process has seen of the update as it put it into the store (a simulated site); None
            reads the store.
    """
    try:
        _check_claims(site, attempt, manifest, expected)
        weight = _check_weight(manifest.weight)
        if expected.task == "evaluate" or (manifest.params_type is None and expected.task != "train"):
            return Accepted(manifest, weight, None)
        if manifest.params_type is None or manifest.sha256 is None:
            raise _Refused("no_params", "it holds metrics but no parameters: send params in a training round")
        tensors = _open(store, JobPaths(expected.job_id).update(expected.round, site, attempt), manifest)
        _check_names(tensors.spec, expected.spec)
        seen = inspection or inspect_tensors(tensors, store.block_elements)
        if seen.digest.sha256 != manifest.sha256:
            raise _Refused("bytes", f"it has sha256 {seen.digest.sha256}, its manifest says {manifest.sha256}")
        if seen.not_finite is not None:
            raise _Refused("not_finite", seen.not_finite)
    except _Refused as refused:
        return Rejected(site, attempt, manifest, refused.code, str(refused))
    return Accepted(manifest, weight, tensors)


def _check_claims(site: str, attempt: int, manifest: UpdateManifest, expected: Expected) -> None:
    for code, found, wanted in (
        ("job", manifest.job_id, expected.job_id),
        ("site", manifest.site, site),
        ("round", manifest.round, expected.round),
        ("attempt", manifest.attempt, attempt),
        ("task", manifest.task, expected.task),
        ("base", manifest.base_sha256, expected.base_sha256),
    ):
        if found != wanted:
            raise _Refused(code, f"its manifest says {code} {found}, expected {wanted}")
    if expected.transfer == "DIFF" and manifest.params_type == "FULL":
        raise _Refused("params_type", "it is FULL where the recipe asks for DIFF")


def _check_weight(weight: float | str) -> float:
    if isinstance(weight, str) or not math.isfinite(weight) or weight < 0:
        raise _Refused("weight", f"its weight is {weight}: NUM_STEPS_CURRENT_ROUND must be a finite number from 0")
    return weight


def _check_names(found: Spec, expected: Spec) -> None:
    if unknown := sorted(found.keys() - expected.keys()):
        raise _Refused("unknown_parameter", f"it has parameters that the model lacks: {_some(unknown)}")
    if missing := sorted(expected.keys() - found.keys()):
        raise _Refused("missing_parameter", f"it lacks parameters of the model: {_some(missing)}")
    for name in sorted(expected):
        if found[name].shape != expected[name].shape:
            raise _Refused("shape", f"{name}: expected {list(expected[name].shape)}, got {list(found[name].shape)}")
        if found[name].kind != expected[name].kind:
            raise _Refused("dtype", f"{name}: expected {expected[name].dtype}, got {found[name].dtype}")


def _open(store: Store, path: str, manifest: UpdateManifest) -> TensorReader:
    try:
        size = store.size(path)
        if size != manifest.size:
            raise _Refused("bytes", f"it has {size} bytes, its manifest says {manifest.size}")
        return store.tensors(path, size)
    except FileNotFoundError:
        raise _Refused("bytes", "its manifest is there, but the update is not") from None
    except IntegrityError as error:
        raise _Refused("bytes", str(error)) from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
