"""The gate accepts an update, or rejects it with a code and a reason that says what is wrong."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool.arrays import save_and_hash
from fedpool.messages import UpdateManifest
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery
from fedpool.store import Store
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Rejected, judge
from fedpool.tensors import TensorSpec
from tests.updates import sent_by

PATHS = JobPaths("job-1")
BASE_SHA256 = "b" * 64
SPEC = {
    "w": TensorSpec("F32", (2, 3)),
    "half": TensorSpec("BF16", (2,)),
    "count": TensorSpec("I64", ()),
    "mask": TensorSpec("BOOL", (2,)),
    "none": TensorSpec("F32", (0,)),
}
GOOD: Mapping[str, Any] = {
    "w": torch.ones(2, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "mask": torch.tensor([True, False]),
    "none": torch.empty(0),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def expected(**changes: Any) -> Expected:
    fields: dict[str, Any] = {
        "job_id": "job-1",
        "round": 2,
        "task": "train",
        "base_sha256": BASE_SHA256,
        "spec": SPEC,
        "transfer": "FULL",
    }
    return Expected(**{**fields, **changes})


def sent(store: Store, params: Mapping[str, Any] | None = GOOD, **changes: Any) -> UpdateManifest:
    """Put site-1's update in the store; returns its manifest."""
    fields: dict[str, Any] = {"round": 2, "base_sha256": BASE_SHA256, "weight": 5.0, "params_type": None}
    if params is not None:
        with store.staged(PATHS.update(2, "site-1")) as file:
            digest = save_and_hash(file, params)
        fields |= {"params_type": "FULL", "sha256": digest.sha256, "size": digest.size}
    return sent_by(**{"site": "site-1", **fields, **changes})


def rejected(store: Store, manifest: UpdateManifest, **changes: Any) -> tuple[str, str]:
    outcome = judge(store, "site-1", 0, Delivery(manifest, "m" * 64), expected(**changes))
    assert isinstance(outcome, Rejected)
    assert outcome.manifest is manifest
    return outcome.code, outcome.reason


def accepted(store: Store, manifest: UpdateManifest, **changes: Any) -> Accepted:
    outcome = judge(store, "site-1", 0, Delivery(manifest, "m" * 64), expected(**changes))
    assert isinstance(outcome, Accepted), outcome
    return outcome


def test_a_good_update_is_accepted_with_its_weight_and_tensors(store: Store) -> None:
    outcome = accepted(store, sent(store))
    assert outcome.weight == 5.0
    assert outcome.tensors is not None
    assert outcome.tensors.spec == SPEC


def test_an_empty_site_of_weight_0_is_accepted(store: Store) -> None:
    assert accepted(store, sent(store, weight=0.0)).weight == 0.0


@pytest.mark.parametrize(
    ("code", "changes", "words"),
    [
        ("job", {"job_id": "job-2"}, "says job job-2, expected job-1"),
        ("site", {"site": "site-2"}, "says site site-2, expected site-1"),
        ("round", {"round": 1}, "says round 1, expected 2"),
        ("attempt", {"attempt": 1}, "says attempt 1, expected 0"),
        ("task", {"task": "evaluate"}, "says task evaluate, expected train"),
        ("base", {"base_sha256": "c" * 64}, f"says base {'c' * 64}, expected {'b' * 64}"),
    ],
)
def test_an_answer_to_another_question_is_rejected(
    code: str, changes: dict[str, Any], words: str, store: Store
) -> None:
    found, reason = rejected(store, sent(store, **changes))
    assert found == code
    assert words in reason


def test_a_full_update_is_rejected_where_a_difference_is_expected(store: Store) -> None:
    assert rejected(store, sent(store), transfer="DIFF") == ("params_type", "it is FULL where the recipe asks for DIFF")


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
def test_a_declared_difference_is_accepted_either_way(transfer: str, store: Store) -> None:
    assert accepted(store, sent(store, params_type="DIFF"), transfer=transfer).tensors is not None


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "nan", "many", "True"])
def test_a_weight_that_is_no_finite_number_from_0_is_rejected(weight: float | str, store: Store) -> None:
    code, reason = rejected(store, sent(store, weight=weight))
    assert code == "weight"
    assert f"its weight is {weight}: NUM_STEPS_CURRENT_ROUND must be a finite number from 0" == reason


@pytest.mark.parametrize("weight", [1.5e12, 1e300, float("1e308")])
def test_a_weight_beyond_the_recipes_limit_is_rejected(weight: float, store: Store) -> None:
    assert rejected(store, sent(store, weight=weight)) == ("weight", f"its weight is {weight:g}, max_weight is 1e+12")


def test_the_limit_on_weights_is_the_recipes_and_holds_for_examples_as_well(store: Store) -> None:
    manifest = sent(store, weight=100.0)
    assert accepted(store, manifest, max_weight=100.0).weight == 100.0
    assert rejected(store, manifest, max_weight=99.0) == ("weight", "its weight is 100, max_weight is 99")
    manifest = sent_by("site-1", round=2, base_sha256=BASE_SHA256, task="evaluate", meta={"NUM_EVAL_EXAMPLES": 100})
    assert accepted(store, manifest, max_weight=100.0, task="evaluate").weight == 1.0
    code, reason = rejected(store, manifest, max_weight=99.0, task="evaluate")
    assert (code, reason) == ("weight", "its meta says NUM_EVAL_EXAMPLES 100, max_weight is 99")


AS_MANY = [f"{number:04d}".ljust(250, "x") for number in range(1000)]

BEYOND: dict[str, tuple[str, dict[str, Any], str]] = {
    "metrics": ("metrics", {"metrics": dict.fromkeys(map(str, range(1001)), 0.5)}, "metrics: it has 1001 entries, but"),
    "logged": ("logged", {"logged": dict.fromkeys(map(str, range(1001)), 0.5)}, "logged: it has 1001 entries, but"),
    "meta": ("meta", {"meta": dict.fromkeys(map(str, range(1001)), "a")}, "meta: it has 1001 entries, but"),
    "a metric's name": ("metrics", {"metrics": {"x" * 251: 1.0}}, f"the name {'x' * 40!r}... has 251 characters"),
    "a scalar's name": ("logged", {"logged": {"x" * 251: 1.0}}, "has 251 characters, but at most 250 are allowed"),
    "a key of meta": ("meta", {"meta": {"x" * 251: 1}}, "has 251 characters, but at most 250 are allowed"),
    "a metric": (
        "metrics",
        {"metrics": {"loss": 1.7e308}},
        "metrics: loss is 1.7e+308: the absolute value of a number",
    ),
    "a scalar": ("logged", {"logged": {"loss": -1.1e100}}, "logged: loss is -1.1e+100: the absolute value of a number"),
    "meta's number": (
        "meta",
        {"meta": {"rows": 10**400}},
        f"meta: rows is 1{'0' * 99}: the absolute value of a number",
    ),
    "the seconds": ("seconds", {"seconds": -1e308}, "it says that it took -1e+308 s: that must be from 0 to 1e+09"),
}


@pytest.mark.parametrize("what", BEYOND)
@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_what_is_too_much_beside_the_tensors_is_rejected_by_a_code_of_its_own(
    what: str, task: Any, store: Store
) -> None:
    code, fields, words = BEYOND[what]
    found, reason = rejected(store, sent(store, task=task, **fields), task=task)
    assert found == code and words in reason and len(reason) < 1100


@pytest.mark.parametrize("what", BEYOND)
def test_in_a_job_of_an_earlier_version_it_was_accepted(what: str, store: Store) -> None:
    _, fields, _ = BEYOND[what]
    accepted(store, sent(store, **fields), bounded=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": dict.fromkeys(AS_MANY, -1e100)},
        {"logged": dict.fromkeys(AS_MANY, None)},
        {"meta": dict.fromkeys(AS_MANY, 10**100)},
        {"meta": {"note": "x" * 20_000}, "seconds": 1e9},  # a long text is cut when it is read
    ],
    ids=["metrics", "logged", "meta", "text"],
)
def test_as_much_as_is_allowed_is_accepted(fields: dict[str, Any], store: Store) -> None:
    accepted(store, sent(store, **fields))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-0.1, "accuracy is -0.1, but metric_ranges says 0 to 1"),
        (1e6, "accuracy is 1e+06, but metric_ranges says 0 to 1"),
    ],
)
def test_a_metric_outside_its_range_is_rejected(value: float, said: str, store: Store) -> None:
    ranges = {"accuracy": (0.0, 1.0), "loss": (0.0, None)}
    manifest = sent(store, metrics={"accuracy": value, "loss": 1e6})
    assert rejected(store, manifest, metric_ranges=ranges) == ("metrics", f"its metric {said}")


@pytest.mark.parametrize(
    "metrics", [{"accuracy": 0.0, "loss": 1e6}, {"accuracy": 1.0}, {"accuracy": None}, {"other": -5.0}]
)
def test_a_metric_inside_its_range_or_without_one_is_accepted(metrics: dict[str, Any], store: Store) -> None:
    ranges = {"accuracy": (0.0, 1.0), "loss": (0.0, None)}
    accepted(store, sent(store, metrics=metrics), metric_ranges=ranges)


@pytest.mark.parametrize("steps", [10**400, 1.1e12, 5e-324, 9e-13])
def test_a_number_that_the_algorithm_divides_by_is_neither_tiny_nor_huge(steps: float, store: Store) -> None:
    code, reason = rejected(store, sent(store, meta={"LOCAL_STEPS": steps}), positive_meta=("LOCAL_STEPS",))
    assert code == "meta"
    assert reason.startswith(("its meta says LOCAL_STEPS", "meta: LOCAL_STEPS is 1000"))


@pytest.mark.parametrize("sha256", ["x" * 500_000, "0" * 63, "0" * 65, "A" * 64, ""])
def test_a_hash_that_is_none_does_not_get_into_the_record(sha256: str, store: Store) -> None:
    outcome = judge(store, "site-1", 0, Delivery(sent(store, sha256=sha256), "m" * 64), expected())
    assert isinstance(outcome, Rejected)
    assert (outcome.code, outcome.manifest, outcome.manifest_sha256) == ("manifest", None, "m" * 64)
    assert f"{sha256[:100]!r} is not a sha256 in hex" in outcome.reason and len(outcome.reason) < 200


@pytest.mark.parametrize("count", [-1, 10**400, "nan", True, None])
@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_a_number_of_examples_that_is_no_finite_number_from_0_is_rejected(task: Any, count: Any, store: Store) -> None:
    manifest = sent(store, task=task, meta={"NUM_EVAL_EXAMPLES": count})
    code, reason = rejected(store, manifest, task=task)
    assert code == "weight"
    assert reason.startswith(f"its meta says NUM_EVAL_EXAMPLES {count}"[:999])


def test_in_a_job_of_an_earlier_version_a_number_of_examples_has_no_meaning(store: Store) -> None:
    assert accepted(store, sent(store, meta={"NUM_EVAL_EXAMPLES": "many"}), eval_examples=False).weight == 5.0


@pytest.mark.parametrize("count", [0, 12, 2.5])
def test_a_number_of_examples_is_no_weight_of_the_update(count: float, store: Store) -> None:
    assert accepted(store, sent(store, meta={"NUM_EVAL_EXAMPLES": count})).weight == 5.0


def test_metrics_without_parameters_are_rejected_in_a_training_round(store: Store) -> None:
    code, reason = rejected(store, sent(store, None, metrics={"acc": 0.5}))
    assert code == "no_params"
    assert "send params in a training round" in reason


def test_parameters_without_a_hash_are_rejected(store: Store) -> None:
    assert rejected(store, sent(store, sha256=None))[0] == "no_params"


def test_an_evaluation_needs_no_parameters(store: Store) -> None:
    assert accepted(store, sent(store, None, task="evaluate"), task="evaluate").tensors is None


def test_a_site_that_has_no_model_of_its_own_may_say_so(store: Store) -> None:
    assert accepted(store, sent(store, None, task="submit_model"), task="submit_model").tensors is None


def test_a_model_that_a_site_submits_is_judged_as_any_update(store: Store) -> None:
    assert accepted(store, sent(store, task="submit_model"), task="submit_model").tensors is not None


def test_a_model_that_a_site_submits_must_not_be_a_difference(store: Store) -> None:
    code, reason = rejected(store, sent(store, task="submit_model", params_type="DIFF"), task="submit_model")
    assert code == "params_type"
    assert "it is DIFF where a site's own model is asked for" in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, f"its manifest says {'0' * 64}"),
        ({"size": 3}, "its manifest says 3"),
        ({"size": 10**12}, "its manifest says 1000000000000"),
        ({"size": -1}, "its manifest says -1"),
    ],
)
def test_bytes_that_differ_from_the_manifest_are_rejected(changes: dict[str, Any], words: str, store: Store) -> None:
    code, reason = rejected(store, sent(store, **changes))
    assert code == "bytes"
    assert words in reason


@pytest.mark.parametrize("at", [8, 20, -1])
def test_a_byte_that_changed_anywhere_in_the_file_is_found(at: int, store: Store) -> None:
    manifest = sent(store)
    path = Path(store.full(PATHS.update(2, "site-1")))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert rejected(store, manifest)[0] in ("bytes", "unknown_parameter")


def test_bytes_that_are_no_safetensors_file_are_rejected(store: Store) -> None:
    digest = store.write_json(PATHS.update(2, "site-1"), {"no": "tensors"})
    code, reason = rejected(store, sent(store, None, params_type="FULL", sha256=digest.sha256, size=digest.size))
    assert code == "bytes"
    assert "is not a valid safetensors file" in reason


def test_an_update_that_is_not_in_the_store_is_rejected(store: Store) -> None:
    code, reason = rejected(store, sent(store, None, params_type="FULL", sha256="0" * 64, size=100))
    assert code == "bytes"
    assert "its manifest is there, but the update is not" in reason


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("code", "params", "words"),
    [
        ("unknown_parameter", {**GOOD, "x": torch.ones(1)}, "parameters that the model lacks: x"),
        ("unknown_parameter", {**GOOD, **{f"x{n}": torch.ones(1) for n in range(7)}}, "x0, x1, x2, x3, x4 and 2 more"),
        ("missing_parameter", without("w"), "lacks parameters of the model: w"),
        ("missing_parameter", {}, "count, half, mask, none, w"),
        ("unknown_parameter", {**without("w"), "W": torch.ones(2, 3)}, "lacks: W"),
        ("shape", {**GOOD, "w": torch.ones(3, 2)}, "w: expected [2, 3], got [3, 2]"),
        ("shape", {**GOOD, "w": torch.ones(6)}, "w: expected [2, 3], got [6]"),
        ("shape", {**GOOD, "count": torch.tensor([3])}, "count: expected [], got [1]"),
        ("dtype", {**GOOD, "w": torch.ones(2, 3, dtype=torch.int32)}, "w: expected F32, got I32"),
        ("dtype", {**GOOD, "count": torch.tensor(3.0)}, "count: expected I64, got F32"),
        ("dtype", {**GOOD, "mask": torch.ones(2, dtype=torch.uint8)}, "mask: expected BOOL, got U8"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit_the_model_are_rejected_by_name(
    code: str, params: dict[str, Any], words: str, store: Store
) -> None:
    found, reason = rejected(store, sent(store, params))
    assert found == code
    assert words in reason


def test_another_dtype_of_the_same_kind_is_accepted(store: Store) -> None:
    params = {**GOOD, "w": torch.ones(2, 3, dtype=torch.float64), "half": torch.ones(2), "count": np.int32(3)}
    assert accepted(store, sent(store, params)).tensors is not None


@pytest.mark.parametrize("name", ["w", "half"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_rejected_by_name(name: str, bad: float, store: Store) -> None:
    value = GOOD[name].clone()
    value.view(-1)[1] = bad
    code, reason = rejected(store, sent(store, {**GOOD, name: value}))
    assert code == "not_finite"
    assert reason == f"{name} holds NaN or infinity, first among its elements 0 to {value.numel() - 1}"


def test_every_block_is_looked_at_and_the_first_bad_one_is_named(store: Store) -> None:
    store.block_elements = 4
    value = torch.ones(14)
    value[9] = value[13] = math.nan
    code, reason = rejected(store, sent(store, {"w": value}), spec={"w": TensorSpec("F32", (14,))})
    assert code == "not_finite"
    assert reason == "w holds NaN or infinity, first among its elements 8 to 11"


def test_a_rejected_update_stays_in_the_store(store: Store) -> None:
    manifest = sent(store, weight=-1.0)
    assert rejected(store, manifest)[0] == "weight"
    assert store.exists(PATHS.update(2, "site-1"))
