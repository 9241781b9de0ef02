"""The gate: an update is accepted, or rejected with a reason, before it can touch the sum."""

import math
from dataclasses import dataclass

from fedpool.arrays import blocks, torch_block
from fedpool.errors import IntegrityError
from fedpool.manifest import UpdateManifest
from fedpool.store import JobPaths, Store, check_digest
from fedpool.tensors import Digest, Spec, TensorReader

BLOCK_ELEMENTS = 1 << 20
"""Elements that are read at once: 4 MiB of float32, small enough for a processor's cache."""


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


@dataclass(frozen=True, slots=True)
class Rejected:
    """An update that may not, with a code for programs and a sentence for people. It stays in the store."""

    manifest: UpdateManifest
    code: str
    reason: str


class _Refused(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def judge(store: Store, site: str, manifest: UpdateManifest, expected: Expected) -> Accepted | Rejected:
    """Check everything about an update: whom it is from, what it answers, its bytes, names, shapes, values and weight.

    Args:
        site: who was asked; the manifest must say the same.
    """
    try:
        _check_claims(site, manifest, expected)
        weight = _check_weight(manifest.weight)
        if expected.task == "evaluate" or (manifest.params_type is None and expected.task != "train"):
            return Accepted(manifest, weight, None)
        if manifest.params_type is None or manifest.sha256 is None:
            raise _Refused("no_params", "it holds metrics but no parameters: send params in a training round")
        path = JobPaths(expected.job_id).update(expected.round, site)
        try:
            with store.open(path) as file:
                check_digest(file, Digest(manifest.sha256, manifest.size), where=f"{site}'s update")
            tensors = store.tensors(path, manifest.size)
        except IntegrityError as error:
            raise _Refused("bytes", str(error)) from None
        _check_names(tensors.spec, expected.spec)
        _check_values(tensors)
    except _Refused as refused:
        return Rejected(manifest, refused.code, str(refused))
    return Accepted(manifest, weight, tensors)


def _check_claims(site: str, manifest: UpdateManifest, expected: Expected) -> None:
    for code, found, wanted in (
        ("job", manifest.job_id, expected.job_id),
        ("site", manifest.site, site),
        ("round", manifest.round, expected.round),
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


def _check_values(tensors: TensorReader) -> None:
    floats = {name: entry for name, entry in tensors.spec.items() if entry.kind == "float"}
    for name, start, stop in blocks(floats, BLOCK_ELEMENTS):
        block = torch_block(tensors.read_block(name, start, stop), floats[name].dtype)
        # One pass that allocates nothing: a NaN wins both ends of aminmax, an infinity is one of them.
        low, high = block.aminmax()
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            count = int((~block.isfinite()).sum())
            raise _Refused("not_finite", f"{name} holds NaN or infinity ({count} of elements {start} to {stop - 1})")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
