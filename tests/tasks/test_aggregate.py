"""Streaming aggregation: block by block, from updates to the next global model in the store."""

import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from fedpool.arrays import CHUNK_ELEMENTS, difference_norm, load_arrays, numpy_dtype, save_and_hash
from fedpool.errors import RoundError
from fedpool.flows.fedavg import FedAvg
from fedpool.inspection import inspect_tensors
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery
from fedpool.store import Store
from fedpool.tasks.aggregate import Before, aggregate
from fedpool.tasks.aggregator import Aggregator
from fedpool.tasks.aggregators import GeometricMedian, Mean, Median, NormClippedMean
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, judge
from fedpool.tasks.strategy import State, Strategy, Update
from fedpool.tasks.weighing import UpdateChanged
from fedpool.tensors import ITEM_SIZES, Digest, TensorReader
from tests.updates import sent_by

PATHS = JobPaths("job-1")


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Round:
    """A round in a local store, with real updates that passed the gate."""

    def __init__(self, folder: Path, base: Mapping[str, Any]) -> None:
        self.store = Store(folder)
        with self.store.staged(PATHS.global_model(0)) as file:
            self.digest = save_and_hash(file, base)
        self.updates: list[Accepted] = []

    @property
    def base(self) -> TensorReader:
        return self.store.tensors(PATHS.global_model(0), self.digest.size)

    def send(self, site: str, params: Mapping[str, Any], weight: float = 1.0, params_type: str = "FULL") -> None:
        """Store a site's update and pass it through the gate."""
        with self.store.staged(PATHS.update(0, site)) as file:
            digest = save_and_hash(file, params)
        manifest = sent_by(
            site,
            base_sha256=self.digest.sha256,
            params_type=params_type,
            sha256=digest.sha256,
            size=digest.size,
            weight=weight,
        )
        spec = {name: entry for name, entry in self.base.spec.items() if name in params}
        wanted = Expected("job-1", 0, "train", self.digest.sha256, spec, "FULL", max_weight=sys.float_info.max)
        # Inspected here, as a simulated site does.
        seen = inspect_tensors(self.store.tensors(PATHS.update(0, site), digest.size), self.store.block_elements)
        outcome = judge(self.store, site, 0, Delivery(manifest, "m" * 64, seen), wanted)
        assert isinstance(outcome, Accepted), outcome
        self.updates.append(outcome)

    def aggregate(
        self,
        factors: Mapping[str, float] | None = None,
        number: int = 1,
        aggregator: Aggregator | None = None,
        strategy: Strategy | None = None,
    ) -> Digest:
        """Write the next global model as round `number`'s, by a strategy or by FedAvg."""
        return aggregate(
            strategy or FedAvg(aggregator or Mean()),
            store=self.store,
            before=Before(self.base),
            updates=self.updates,
            factors=factors or {},
            target=PATHS.global_model(number),
            state_target=PATHS.state(number - 1),
        ).model

    def path(self, number: int = 1) -> Path:
        return Path(self.store.full(PATHS.global_model(number)))

    def result(self, factors: Mapping[str, float] | None = None, number: int = 1) -> dict[str, Any]:
        """The next global model."""
        self.aggregate(factors, number)
        return load_arrays(self.path(number), "torch")


def f32(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, dtype=np.float32)


def test_an_update_that_changes_after_its_site_has_inspected_it_is_not_used(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(0, 0)})
    round.send("site-1", {"w": f32(2, 4)})
    round.send("site-2", {"w": f32(6, 8)})
    with Path(round.store.full(PATHS.update(0, "site-2"))).open("r+b") as file:
        save_and_hash(file, {"w": f32(1e30, 1e30)})
    with pytest.raises(UpdateChanged, match="was changed after it was checked: 'w' differs") as changed:
        round.aggregate()
    assert changed.value.site == "site-2"
    assert not round.store.exists(PATHS.global_model(1))


def test_the_mean_is_weighted_and_written_with_its_digest(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(0, 0)})
    round.send("site-1", {"w": f32(2, 4)}, 1)
    round.send("site-2", {"w": f32(6, 8)}, 3)
    digest = round.aggregate()
    with round.store.open(PATHS.global_model(1)) as file:
        assert len(file.read()) == digest.size
    assert load_arrays(round.path(), "torch")["w"].tolist() == [5.0, 7.0]


def test_the_next_model_has_the_names_dtypes_and_shapes_of_the_base(tmp_path: Path) -> None:
    base = {
        "w": torch.zeros(2, 3, dtype=torch.bfloat16),
        "n": torch.tensor(0),
        "none": torch.empty(0, 2),
        "b": torch.tensor(True),
    }
    round = Round(tmp_path, base)
    round.send("site-1", {**base, "w": torch.ones(2, 3, dtype=torch.float64), "n": np.int8(3)})
    found = round.result()
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (value.dtype, value.shape) for name, value in base.items()
    }


@pytest.mark.parametrize("code", sorted(ITEM_SIZES))
def test_every_dtype_can_be_averaged(code: str, tmp_path: Path) -> None:
    dtype = numpy_dtype(code)
    round = Round(tmp_path, {"w": np.zeros(3, dtype=dtype)})
    for site in ("site-1", "site-2"):
        round.send(site, {"w": np.array([1, 0, 1]).astype(dtype)})
    assert round.result()["w"].to(torch.float64).tolist() == [1.0, 0.0, 1.0]


def test_a_mean_of_half_precision_is_rounded_once_at_the_end(tmp_path: Path) -> None:
    values = [1.0, 1.0078125, 1.0, 1.0, 1.0]  # steps of bfloat16 near 1 are 1/128
    round = Round(tmp_path, {"w": np.zeros(1, dtype=ml_dtypes.bfloat16)})
    for number, value in enumerate(values):
        round.send(f"site-{number}", {"w": np.array([value], dtype=ml_dtypes.bfloat16)}, 2.0 if number == 1 else 1.0)
    expected = np.average(values, weights=[1, 2, 1, 1, 1])
    assert round.result()["w"].item() == float(np.array(expected).astype(ml_dtypes.bfloat16))


def test_integers_come_back_as_the_rounded_mean(tmp_path: Path) -> None:
    round = Round(tmp_path, {"n": np.array([0, 0, 0])})
    round.send("site-1", {"n": np.array([1, 10, -3])})
    round.send("site-2", {"n": np.array([2, 11, -4])}, 2)
    found = round.result()["n"]
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 11, -4]


def test_large_integers_that_all_sites_agree_on_come_back_to_the_bit(tmp_path: Path) -> None:
    values = np.array([2**53 + 1, 2**63 - 1, -(2**63), 1_700_000_000_123_456_789])
    round = Round(tmp_path, {"n": values})
    for site in ("site-1", "site-2", "site-3"):
        round.send(site, {"n": values})
    assert round.result()["n"].tolist() == values.tolist()


def test_an_integer_that_does_not_fit_its_dtype_is_an_error_and_never_wraps_around(tmp_path: Path) -> None:
    round = Round(tmp_path, {"n": np.array([120], dtype=np.int8)})
    round.send("site-1", {"n": np.array([100])}, params_type="DIFF")
    with pytest.raises(RoundError, match="n"):
        round.aggregate()


def test_booleans_are_the_weighted_majority_and_a_tie_leaves_them(tmp_path: Path) -> None:
    round = Round(tmp_path, {"b": np.array([True, False, True, False])})
    round.send("site-1", {"b": np.array([True, True, False, True])}, 1)
    round.send("site-2", {"b": np.array([True, False, True, False])}, 1)
    assert round.result()["b"].tolist() == [True, False, True, False]
    assert round.result({"site-1": 1.5}, number=2)["b"].tolist() == [True, True, False, True]


def test_a_difference_is_added_to_the_base_and_may_be_mixed_with_full_updates(tmp_path: Path) -> None:
    base = {"w": f32(1, 2), "n": np.array(10), "b": np.array(False)}
    round = Round(tmp_path, base)
    round.send("site-1", {"w": f32(1, -1), "n": np.array(-4), "b": np.array(True)}, params_type="DIFF")
    assert {name: value.tolist() for name, value in round.result().items()} == {"w": [2.0, 1.0], "n": 6, "b": True}
    round.send("site-2", {"w": f32(4, 4), "n": np.array(8), "b": np.array(True)})
    assert {name: value.tolist() for name, value in round.result(number=2).items()} == {
        "w": [3.0, 2.5],
        "n": 7,
        "b": True,
    }


def test_factors_multiply_the_weights_of_the_sites_they_name(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(0)})
    round.send("site-1", {"w": f32(2)}, 2)
    round.send("site-2", {"w": f32(6)}, 1)
    assert round.result()["w"].tolist() == pytest.approx([10 / 3])
    assert round.result({"site-2": 6}, number=2)["w"].tolist() == [5.0]
    assert round.result({"site-2": 0}, number=3)["w"].tolist() == [2.0]


def test_an_empty_site_contributes_nothing(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(0)})
    round.send("site-1", {"w": f32(100)}, 0)
    round.send("site-2", {"w": f32(6)}, 2)
    assert round.result()["w"].tolist() == [6.0]


def test_when_every_weight_is_0_the_model_stays_to_the_bit(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(1, -0.0), "n": np.array(3)})
    round.send("site-1", {"w": f32(9, 9), "n": np.array(9)}, 0)
    round.send("site-2", {"w": f32(9, 9), "n": np.array(9)}, 5)
    assert round.aggregate({"site-2": 0.0}) == round.digest
    assert round.path(1).read_bytes() == round.path(0).read_bytes()


def test_parameters_that_nobody_sent_stay_as_they_are(tmp_path: Path) -> None:
    round = Round(tmp_path, {"body": f32(0), "head": f32(5)})
    round.send("site-1", {"body": f32(2)})
    assert {name: value.tolist() for name, value in round.result().items()} == {"body": [2.0], "head": [5.0]}


def test_an_update_without_parameters_is_passed_over(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(0)})
    round.send("site-1", {"w": f32(2)})
    (update,) = round.updates
    round.updates.append(Accepted(update.manifest.model_copy(update={"site": "site-2"}), "m" * 64, 1.0, None))
    assert round.result()["w"].tolist() == [2.0]


@pytest.mark.parametrize("weight", [5e-324, 1e-300, 1e300, 1.7e308])
def test_weights_are_relative_up_to_the_ends_of_what_a_float_holds(weight: float, tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(0)})
    round.send("site-1", {"w": f32(2)}, weight)
    round.send("site-2", {"w": f32(4)}, weight)
    assert round.result()["w"].tolist() == [3.0]


def test_weights_that_overflow_with_their_factors_still_count_as_the_heaviest(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(0), "n": np.array(0)})
    round.send("site-1", {"w": f32(2), "n": np.array(2)}, 1.7e308)
    round.send("site-2", {"w": f32(4), "n": np.array(4)}, 1.0)
    round.send("site-3", {"w": f32(6), "n": np.array(6)}, 1.7e308)
    found = round.result({"site-1": 10.0, "site-3": 10.0})
    assert {name: value.tolist() for name, value in found.items()} == {"w": [4.0], "n": 4}


def test_the_order_in_which_updates_arrive_changes_no_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    round = Round(tmp_path, {"w": np.zeros(1000, dtype=np.float32)})
    for number in range(6):
        round.send(f"site-{number}", {"w": generator.normal(size=1000).astype(np.float32)}, float(number + 1))
    digests = set()
    for number in range(1, 5):
        digests.add(round.aggregate(number=number).sha256)
        generator.shuffle(round.updates)
    assert len(digests) == 1


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_size_of_the_blocks_changes_no_bit(size: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base = {
        "w": generator.normal(size=(5, 4)).astype(np.float32),
        "n": np.arange(5),
        "b": np.array([True, False, True]),
    }
    round = Round(tmp_path, base)
    for number, params_type in enumerate(["FULL", "DIFF", "FULL"]):
        round.send(
            f"site-{number}",
            {**base, "w": generator.normal(size=(5, 4)).astype(np.float32), "n": np.arange(5) * number},
            number + 0.5,
            params_type,
        )
    whole = round.aggregate(number=1)
    round.store.block_elements = size
    assert round.aggregate(number=2) == whole


@pytest.mark.parametrize(
    "aggregator",
    [Mean(), Median(), GeometricMedian(), NormClippedMean(clip_norm=30.0)],
    ids=lambda made: type(made).__name__,
)
def test_neither_the_kind_of_store_nor_the_number_of_threads_changes_a_bit(
    aggregator: Aggregator, tmp_path: Path, torch_threads: Callable[[int], None]
) -> None:
    """Each store has its own block size; torch splits large tensors over its threads."""
    generator = np.random.default_rng(0)
    size = 5 * CHUNK_ELEMENTS + 3
    round = Round(tmp_path, {"w": generator.normal(size=size).astype(np.float64)})
    for number in range(4):
        round.send(f"site-{number}", {"w": generator.normal(size=size).astype(np.float64)}, number + 0.5)
    digests, norms = set(), set()
    for number, (chunks, threads) in enumerate([(1, 1), (2, 2), (2, 1), (8, 3), (256, 4)], start=1):
        torch_threads(threads)
        round.store.block_elements = chunks * CHUNK_ELEMENTS
        digests.add(round.aggregate(number=number, aggregator=aggregator).sha256)
        assert torch.get_num_threads() == threads  # as before
        assert round.updates[0].tensors is not None
        norms.add(difference_norm(round.updates[0].tensors, round.base, round.store.block_elements))
    assert len(digests) == len(norms) == 1


def test_a_thread_begun_later_has_the_threads_of_torch_that_there_were_before(
    tmp_path: Path, torch_threads: Callable[[int], None]
) -> None:
    torch_threads(3)
    round = Round(tmp_path, {"w": f32(0)})
    round.send("site-1", {"w": f32(1)})
    round.aggregate()
    with ThreadPoolExecutor() as executor:
        assert executor.submit(torch.get_num_threads).result() == 3


def test_a_model_of_more_blocks_than_are_computed_at_once_comes_out_in_order(tmp_path: Path) -> None:
    values = np.arange(100, dtype=np.float32)
    round = Round(tmp_path, {"w": np.zeros_like(values), "v": np.zeros(7)})
    round.send("site-1", {"w": values, "v": np.arange(7.0)})
    round.store.block_elements = 1
    assert {name: value.tolist() for name, value in round.result().items()} == {
        "v": list(range(7)),
        "w": values.tolist(),
    }


def test_an_aggregate_that_is_not_finite_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    round = Round(tmp_path, {"w": f32(3e38)})
    round.send("site-1", {"w": f32(1e38)}, params_type="DIFF")
    with pytest.raises(
        RoundError,
        match="the aggregate of w is not finite although every update was, because their values are too large",
    ):
        round.aggregate()
    assert not round.store.exists(PATHS.global_model(1))


def test_a_strategy_reads_one_parameter_of_one_block_from_sites_in_sorted_order(tmp_path: Path) -> None:
    seen: list[tuple[list[str], list[str], int]] = []

    class Last(Strategy):
        """Takes the last site's model."""

        def apply(self, state: State, updates: Sequence[Update]) -> State:
            (name,) = state.params
            seen.append(([update.site for update in updates], list(updates[0].params), len(updates[0].params)))
            with pytest.raises(KeyError):
                _ = updates[0].params["another"]
            return state.after({name: updates[-1].params[name]})

    round = Round(tmp_path, {"a": f32(0), "b": f32(0)})
    for site, value in (("site-3", 3.0), ("site-1", 1.0), ("site-2", 2.0)):
        round.send(site, {"a": f32(value), "b": f32(value)})
    round.aggregate(strategy=Last())
    assert {name: value.tolist() for name, value in load_arrays(round.path(), "torch").items()} == {
        "a": [3.0],
        "b": [3.0],
    }
    assert sorted(seen) == [(["site-1", "site-2", "site-3"], [name], 1) for name in ("a", "b")]


def test_memory_does_not_grow_with_the_number_of_sites(tmp_path: Path) -> None:
    # 1 MiB per site. A float64 block is used as read, so live memory is what Python allocated.
    size = 1 << 17
    peaks = []
    for num_sites in (2, 20):
        round = Round(tmp_path / str(num_sites), {"w": np.zeros(size)})
        for number in range(num_sites):
            round.send(f"site-{number}", {"w": np.full(size, float(number))})
        tracemalloc.start()
        round.aggregate()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert load_arrays(round.path(), "torch")["w"][-1].item() == pytest.approx((num_sites - 1) / 2)
    assert peaks[0] > 1 << 18  # a block, so this measures something
    assert peaks[1] < peaks[0] + (1 << 20)
