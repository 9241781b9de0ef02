"""The gate: an update is accepted, or rejected with a reason, before it can touch the sum."""

import math
from dataclasses import dataclass

from fedpool.arrays import difference_norm, dtype_limits, inspect_tensors
from fedpool.errors import IntegrityError
from fedpool.manifest import UpdateManifest
from fedpool.model import NUM_EVAL_EXAMPLES, is_count
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery
from fedpool.storable import storable
from fedpool.store import Store
from fedpool.tasks.holes import keeps_holes
from fedpool.tensors import ITEM_SIZES, Inspection, Spec, TensorReader, is_beside, split_beside

_MAX_REASON = 1000


@dataclass(frozen=True, slots=True)
class Expected:
    """What an update has to fit.

    `spec` holds what lies beside the parameters, too; `positive_meta` names what its `meta` must have: of that, 0
    says that the site had nothing to train with and its update has weight 0, unless `idle` is false. `eval_examples`: whether
    `meta` may say how many examples the metrics are of, and then has to say it right.
    `base` is the global model, which the norm of a difference needs; see `Recipe` for `max_norm` and `clip`. `holes` names the
    tensors that may hold infinity where `base` does; None: as of an earlier version, whose sentences its records hold, none may.
    """

    job_id: str
    round: int
    task: str
    base_sha256: str
    spec: Spec
    transfer: str
    base: TensorReader | None = None
    max_norm: float | None = None
    clip: bool = False
    positive_meta: tuple[str, ...] = ()
    holes: frozenset[str] | None = None
    idle: bool = True
    eval_examples: bool = True


@dataclass(frozen=True, slots=True)
class Accepted:
    """An update that may touch the sum; `tensors` is None when the site sent metrics only: in an evaluation, or because
    it has no model of its own to submit.

    `norm` is the L2 norm of its difference to the global model, where that is limited, and `scale` what the difference is
    multiplied by to be within the limit.
    """

    manifest: UpdateManifest
    manifest_sha256: str
    weight: float
    tensors: TensorReader | None
    norm: float | None = None
    scale: float = 1.0

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
    manifest_sha256: str | None
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A site that was asked and sent nothing, with the cause; `away` when it could not be reached."""

    site: str
    attempt: int
    cause: str
    away: bool = False


@dataclass(frozen=True, slots=True)
class Late:
    """A site that was asked and had not answered when the round closed. What it sends after that stays in the store."""

    site: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Probed:
    """An update of a site in quarantine that would have been accepted: the site is let in again from the next round on."""

    update: Accepted

    @property
    def site(self) -> str:
        """Who sent it."""
        return self.update.site

    @property
    def attempt(self) -> int:
        """In which attempt."""
        return self.update.attempt


Outcome = Accepted | Rejected | Failed | Late | Probed
"""What came of asking a site."""


class _Refused(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]} ...")
        self.code = code


def judge(store: Store, site: str, attempt: int, delivery: Delivery, expected: Expected) -> Accepted | Rejected:
    """Check everything about an update: whom it is from, what it answers, its bytes, names, shapes, values, weight and norm.

    Args:
        site: who was asked; the manifest must say the same.
        attempt: in which attempt; likewise.
        delivery: what came.
    """
    manifest = delivery.manifest
    try:
        weight = _check_manifest(site, attempt, manifest, expected)
        if expected.task == "evaluate" or (manifest.params_type is None and expected.task != "train"):
            return Accepted(manifest, delivery.manifest_sha256, weight, None)
        if manifest.params_type is None or manifest.sha256 is None:
            raise _Refused("no_params", "it holds metrics but no parameters: send params in a training round")
        tensors = _open(store, JobPaths(expected.job_id).update(expected.round, site, attempt), manifest, expected.spec)
        _check_names(tensors.spec, expected.spec)
        seen = delivery.inspection or inspect_tensors(tensors, store.block_elements, keep_blocks=True)
        if seen.digest.sha256 != manifest.sha256:
            raise _Refused("bytes", f"it has sha256 {seen.digest.sha256}, its manifest says {manifest.sha256}")
        if seen.blocks is not None:
            tensors = tensors.checked(seen.blocks)
        _check_finite(seen, tensors, manifest.params_type, expected, store.block_elements)
        _check_range(seen, expected.spec, manifest.params_type)
        norm, scale = _norm_and_scale(tensors, manifest.params_type, expected, store.block_elements)
    except _Refused as refused:
        return Rejected(site, attempt, manifest, delivery.manifest_sha256, refused.code, storable(str(refused)))
    except IntegrityError as error:  # it was swapped while it was read
        return Rejected(site, attempt, manifest, delivery.manifest_sha256, "bytes", storable(str(error))[:_MAX_REASON])
    return Accepted(manifest, delivery.manifest_sha256, weight, tensors, norm, scale)


def judge_manifest(
    site: str, attempt: int, delivery: Delivery, expected: Expected, norm: float | None, scale: float
) -> Accepted | Rejected:
    """Check an update that was accepted and is not kept any more, as far as its manifest tells: whom it is from, and its weight.

    Args:
        norm: of its difference, by the word of the round's record; likewise `scale`.
    """
    try:
        weight = _check_manifest(site, attempt, delivery.manifest, expected)
    except _Refused as refused:
        reason = storable(str(refused))
        return Rejected(site, attempt, delivery.manifest, delivery.manifest_sha256, refused.code, reason)
    return Accepted(delivery.manifest, delivery.manifest_sha256, weight, None, norm, scale)


def _check_manifest(site: str, attempt: int, manifest: UpdateManifest, expected: Expected) -> float:
    """The weight of an update by its manifest, which must fit what was asked."""
    _check_claims(site, attempt, manifest, expected)
    weight = _check_weight(manifest.weight)
    if expected.eval_examples:
        _check_examples(manifest)
    return 0.0 if _is_idle(manifest, expected) else weight


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
            raise _Refused(code, f"its manifest says {code} {str(found)[:200]}, expected {wanted}")
    if expected.transfer == "DIFF" and manifest.params_type == "FULL":
        raise _Refused("params_type", "it is FULL where the recipe asks for DIFF")
    if expected.task == "submit_model" and manifest.params_type == "DIFF":
        raise _Refused("params_type", "it is DIFF where a site's own model is asked for: send it FULL")


def _check_weight(weight: float | str) -> float:
    if isinstance(weight, str) or not math.isfinite(weight) or weight < 0:
        raise _Refused("weight", f"its weight is {weight}: NUM_STEPS_CURRENT_ROUND must be a finite number from 0")
    return weight


def _check_examples(manifest: UpdateManifest) -> None:
    value = manifest.meta.get(NUM_EVAL_EXAMPLES, 0)
    if not is_count(value):
        raise _Refused("weight", f"its meta says {NUM_EVAL_EXAMPLES} {value}: it must be a finite number from 0")


def _is_idle(manifest: UpdateManifest, expected: Expected) -> bool:
    """Whether the site says that it has done nothing, where the recipe needs to know what it has done."""
    values = {name: manifest.meta.get(name) for name in expected.positive_meta}
    for name, value in values.items():
        if not is_count(value) or (value == 0 and not expected.idle):
            raise _Refused("meta", f"its meta says {name} {value}: the recipe needs a finite number above 0")
    return any(value == 0 for value in values.values())


def _check_names(found: Spec, expected: Spec) -> None:
    if unknown := sorted(found.keys() - expected.keys()):
        raise _Refused("unknown_parameter", f"it has parameters that the model lacks: {_some(unknown)}")
    missing = sorted(expected.keys() - found.keys())
    if missing and all(is_beside(name) for name in missing):
        raise _Refused(
            "missing_extras",
            f"it lacks FLModel.extras[{split_beside(missing[0])[0]!r}], which the recipe's algorithm exchanges beside the "
            f"parameters: {_some([split_beside(name)[1] for name in missing])}",
        )
    if missing:
        raise _Refused("missing_parameter", f"it lacks parameters of the model: {_some(missing)}")
    for name in sorted(expected):
        if found[name].shape != expected[name].shape:
            raise _Refused("shape", f"{name}: expected {list(expected[name].shape)}, got {list(found[name].shape)}")
        if found[name].kind != expected[name].kind:
            raise _Refused("dtype", f"{name}: expected {expected[name].dtype}, got {found[name].dtype}")


def _check_finite(
    seen: Inspection, tensors: TensorReader, params_type: str, expected: Expected, block_elements: int
) -> None:
    for name, where in seen.not_finite.items():
        if expected.holes is None:
            raise _Refused("not_finite", where)
        if name not in expected.holes:
            raise _Refused("not_finite", f"{where}; if it is meant to, keep it at the sites with exclude_vars")
        assert expected.base is not None, "who allows holes has the model"
        is_difference = params_type == "DIFF"
        if not keeps_holes(tensors, expected.base, name, block_elements, is_difference=is_difference):
            raise _Refused(
                "not_finite",
                f"{where}, and not only where the global model does, unchanged; if it is meant to, keep it at the sites by "
                "exclude_vars",
            )


def _check_range(seen: Inspection, expected: Spec, params_type: str) -> None:
    """Values that the model's dtype cannot hold would overflow in the mean, and so fail the round for everybody."""
    for name, (low, high) in sorted(seen.extremes.items()):
        lowest, highest = dtype_limits(expected[name].dtype)
        # A difference is added to a value that is there: half of the range leaves room for it.
        room = 2 if params_type == "DIFF" and expected[name].kind == "float" else 1
        for value in (low, high):
            if not lowest <= value * room <= highest:
                raise _Refused(
                    "range", f"{name}: it holds {value:g}, which is out of the range of {expected[name].dtype}"
                )


def _norm_and_scale(
    tensors: TensorReader, params_type: str, expected: Expected, block_elements: int
) -> tuple[float | None, float]:
    """L2 norm of the update's difference to the global model, and what it is scaled by to be within the limit."""
    limit = expected.max_norm
    if limit is None:
        return None, 1.0
    base = expected.base if params_type == "FULL" else None
    norm = difference_norm(tensors, base, block_elements, model=expected.base, holes=expected.holes or ())
    if norm <= limit:
        return norm, 1.0
    if not expected.clip:
        raise _Refused(
            "norm", f"its difference to the global model has the L2 norm {norm:.6g}, max_update_norm is {limit:g}"
        )
    return norm, limit / norm


def _open(store: Store, path: str, manifest: UpdateManifest, expected: Spec) -> TensorReader:
    try:
        size = store.size(path)
        if size != manifest.size:
            raise _Refused("bytes", f"it has {size} bytes, its manifest says {manifest.size}")
        most = max_update_bytes(expected)
        if size > most:
            raise _Refused("size", f"it has {size} bytes, more than any update of this model: at most {most}")
        return store.tensors(path, size, max_header=_max_header_bytes(expected))
    except FileNotFoundError:
        raise _Refused("bytes", "its manifest is there, but the update is not") from None
    except IntegrityError as error:
        raise _Refused("bytes", str(error)) from None


def max_update_bytes(expected: Spec) -> int:
    """The largest file that an update of a model can be: every parameter in the widest dtype, and a generous header."""
    return _max_header_bytes(expected) + max(ITEM_SIZES.values()) * sum(
        entry.num_elements for entry in expected.values()
    )


def _max_header_bytes(expected: Spec) -> int:
    # A character of a name takes up to 12 bytes of JSON; dtype, shape and offsets take the rest.
    return (64 << 10) + sum(256 + 12 * len(name) + 24 * len(entry.shape) for name, entry in expected.items())


def _some(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= 80 else f"{name[:80]}..." for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
