"""The gate's checks on an update's manifest: its sender, the assignment it answers, its weight."""

import math
import re
from collections.abc import Mapping
from typing import Any

from fedpool.bounds import MAX_DIVISOR, MAX_SECONDS, MIN_DIVISOR, out_of_range, too_large, too_many
from fedpool.filters import described
from fedpool.messages import UpdateManifest
from fedpool.model import NUM_EVAL_EXAMPLES, is_count
from fedpool.tasks.expected import Expected, Refused

_SHA256 = re.compile("[0-9a-f]{64}")


def check_manifest(site: str, attempt: int, manifest: UpdateManifest, expected: Expected) -> float:
    """The weight of an update according to its manifest, which must match the assignment."""
    _check_claims(site, attempt, manifest, expected)
    weight = _check_weight(manifest.weight, expected.max_weight)
    if expected.eval_examples:
        _check_examples(manifest, expected.max_weight)
    if expected.bounded:
        _check_bounds(manifest)
    if wrong := out_of_range(manifest.metrics, expected.metric_ranges):
        raise Refused("metrics", f"its metric {wrong}")
    return 0.0 if _is_idle(manifest, expected) else weight


def not_a_hash(manifest: UpdateManifest) -> str | None:
    """What is wrong with the hash that a manifest gives its update; None: nothing."""
    if manifest.sha256 is None or _SHA256.fullmatch(manifest.sha256):
        return None
    return f"its manifest is invalid: {manifest.sha256[:100]!r} is not a sha256 in hex"


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
            raise Refused(code, f"its manifest says {code} {str(found)[:200]}, expected {wanted}")
    _check_filters(manifest, expected)
    if expected.transfer == "DIFF" and manifest.params_type == "FULL":
        raise Refused("params_type", "it is FULL where the recipe asks for DIFF")
    if expected.task == "submit_model" and manifest.params_type == "DIFF":
        raise Refused("params_type", "it is DIFF where a site's own model is asked for: send it FULL")


def _check_filters(manifest: UpdateManifest, expected: Expected) -> None:
    named, wanted = list(manifest.filters), list(described(expected.filters))
    if named != (wanted if manifest.params_type is not None else []):
        raise Refused(
            "filters", f"its manifest names the filters {str(named)[:300]}, the recipe has {str(wanted)[:300]}"
        )


def _check_weight(weight: float | str, limit: float) -> float:
    if isinstance(weight, str) or not math.isfinite(weight) or weight < 0:
        raise Refused("weight", f"its weight is {weight}: NUM_STEPS_CURRENT_ROUND must be a finite number from 0")
    if weight > limit:
        raise Refused("weight", f"its weight is {weight:g}, max_weight is {limit:g}")
    return weight


def _check_examples(manifest: UpdateManifest, limit: float) -> None:
    value = manifest.meta.get(NUM_EVAL_EXAMPLES, 0)
    if not is_count(value):
        raise Refused("weight", f"its meta says {NUM_EVAL_EXAMPLES} {value}: it must be a finite number from 0")
    if value > limit:
        raise Refused("weight", f"its meta says {NUM_EVAL_EXAMPLES} {value:g}, max_weight is {limit:g}")


def _check_bounds(manifest: UpdateManifest) -> None:
    """Refuse what exceeds `fedpool.bounds`, each part of the manifest by a code of its own."""
    for code in ("metrics", "logged", "meta"):
        values: Mapping[str, Any] = getattr(manifest, code)
        if wrong := too_many(values) or too_large(values):
            raise Refused(code, f"{code}: {wrong}")
    if not 0 <= manifest.seconds <= MAX_SECONDS:
        raise Refused("seconds", f"it says that it took {manifest.seconds:g} s: that must be from 0 to {MAX_SECONDS:g}")


def _is_idle(manifest: UpdateManifest, expected: Expected) -> bool:
    """Whether the site reports that it did nothing, if the recipe needs to know."""
    values = {name: manifest.meta.get(name) for name in expected.positive_meta}
    for name, value in values.items():
        if not is_count(value) or (value == 0 and not expected.idle):
            raise Refused("meta", f"its meta says {name} {value}: the recipe needs a finite number above 0")
        if expected.bounded and value != 0 and not MIN_DIVISOR <= value <= MAX_DIVISOR:
            raise Refused("meta", f"its meta says {name} {value:g}: it must be from {MIN_DIVISOR:g} to {MAX_DIVISOR:g}")
    return any(value == 0 for value in values.values())
