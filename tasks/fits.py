"""The gate's checks on tensors: size, names, shapes, values, and distance to the global model."""

from fedpool.arrays import difference_norm, dtype_limits
from fedpool.errors import IntegrityError
from fedpool.inspection import Inspection
from fedpool.messages import UpdateManifest
from fedpool.store import Store
from fedpool.tasks.expected import Expected, Refused
from fedpool.tasks.holes import keeps_holes
from fedpool.tensors import ITEM_SIZES, Spec, TensorReader, Tensors, is_beside, split_beside


def check_names(found: Spec, expected: Spec) -> None:
    """Refuse an update whose names, shapes or kinds of dtype differ from the model's."""
    if unknown := sorted(found.keys() - expected.keys()):
        raise Refused("unknown_parameter", f"it has parameters that the model lacks: {_some(unknown)}")
    missing = sorted(expected.keys() - found.keys())
    if missing and all(is_beside(name) for name in missing):
        raise Refused(
            "missing_extras",
            f"it lacks FLModel.extras[{split_beside(missing[0])[0]!r}], which the recipe's algorithm exchanges beside the "
            f"parameters: {_some([split_beside(name)[1] for name in missing])}",
        )
    if missing:
        raise Refused("missing_parameter", f"it lacks parameters of the model: {_some(missing)}")
    for name in sorted(expected):
        if found[name].shape != expected[name].shape:
            raise Refused("shape", f"{name}: expected {list(expected[name].shape)}, got {list(found[name].shape)}")
        if found[name].kind != expected[name].kind:
            raise Refused("dtype", f"{name}: expected {expected[name].dtype}, got {found[name].dtype}")


def check_finite(seen: Inspection, tensors: Tensors, params_type: str, expected: Expected, block_elements: int) -> None:
    """Refuse an update that holds NaN or infinity where it may not."""
    for name, where in seen.not_finite.items():
        if expected.holes is None:
            raise Refused("not_finite", where)
        if name not in expected.holes:
            raise Refused("not_finite", f"{where}; if it is meant to, keep it at the sites with exclude_vars")
        assert expected.base is not None, "holes need the model"
        is_difference = params_type == "DIFF"
        if not keeps_holes(tensors, expected.base, name, block_elements, is_difference=is_difference):
            raise Refused(
                "not_finite",
                f"{where}, and not only where the global model does, unchanged; if it is meant to, keep it at the sites by "
                "exclude_vars",
            )


def check_range(seen: Inspection, expected: Spec, params_type: str) -> None:
    """Refuse values outside the range of the model's dtype: they would make the mean overflow."""
    for name, (low, high) in sorted(seen.extremes.items()):
        lowest, highest = dtype_limits(expected[name].dtype)
        # A difference is added to an existing value: half of the range leaves room for it.
        room = 2 if params_type == "DIFF" and expected[name].kind == "float" else 1
        for value in (low, high):
            if not lowest <= value * room <= highest:
                raise Refused(
                    "range", f"{name}: it holds {value:g}, which is out of the range of {expected[name].dtype}"
                )


def norm_and_scale(
    tensors: Tensors, params_type: str, expected: Expected, block_elements: int
) -> tuple[float | None, float]:
    """L2 norm of the difference to the global model, and the factor that brings it to the limit."""
    limit = expected.max_norm
    if limit is None:
        return None, 1.0
    base = expected.base if params_type == "FULL" else None
    norm = difference_norm(tensors, base, block_elements, model=expected.base, holes=expected.holes or ())
    if norm <= limit:
        return norm, 1.0
    if not expected.clip:
        raise Refused(
            "norm", f"its difference to the global model has the L2 norm {norm:.6g}, max_update_norm is {limit:g}"
        )
    return norm, limit / norm


def open_update(store: Store, path: str, manifest: UpdateManifest, expected: Expected) -> TensorReader:
    """The tensors of an update's file. Refuses a file that is missing, too large or malformed."""
    try:
        size = store.size(path)
        if size != manifest.size:
            raise Refused("bytes", f"it has {size} bytes, its manifest says {manifest.size}")
        most = max_update_bytes(expected)
        if size > most:
            raise Refused("size", f"it has {size} bytes, more than any update of this model: at most {most}")
        return store.tensors(path, size, max_header=round(expected.growth * _max_header_bytes(expected.spec)))
    except FileNotFoundError:
        raise Refused("bytes", "its manifest is there, but the update is not") from None
    except IntegrityError as error:
        raise Refused("bytes", str(error)) from None


def max_update_bytes(expected: Expected) -> int:
    """The largest possible update file: all parameters in the widest dtype, a generous header."""
    values = max(ITEM_SIZES.values()) * sum(entry.num_elements for entry in expected.spec.values())
    return round(expected.growth * (_max_header_bytes(expected.spec) + values))


def _max_header_bytes(expected: Spec) -> int:
    # A character of a name takes up to 12 bytes of JSON. The rest is for dtype, shape and offsets.
    return (64 << 10) + sum(256 + 12 * len(name) + 24 * len(entry.shape) for name, entry in expected.items())


def _some(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= 80 else f"{name[:80]}..." for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
