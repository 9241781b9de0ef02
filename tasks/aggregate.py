"""Aggregation as a stream: block by block, the strategy turns the sites' updates into the next global model in the store.

At no time is there more in memory than one block of the global model, of one update (of each, for a strategy that compares them)
and of what the strategy computes.
"""

import math
import os
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice, starmap
from typing import TypeVar

import torch

from fedpool.arrays import as_bytes, torch_block, torch_dtype
from fedpool.errors import IntegrityError, RoundError
from fedpool.store import Store
from fedpool.tasks.arithmetic import CURRENT, Arithmetic
from fedpool.tasks.gate import Accepted
from fedpool.tasks.geometry import Geometry, blas_products, block_products
from fedpool.tasks.slots import SlotFile, beside_spec, read_wide, slot_file
from fedpool.tasks.strategy import Slice, State, Strategy, Update, relative
from fedpool.tensors import (
    BlockBytes,
    Digest,
    TensorReader,
    beside,
    block_ranges,
    file_order,
    is_trained,
    write_and_hash,
)

_NUM_THREADS = min(4, os.cpu_count() or 1)
_RUN_BLOCKS = 4
_T = TypeVar("_T")


class UpdateChanged(IntegrityError):
    """An update is not what the gate has seen: `site` has changed it since, or the store is damaged."""

    def __init__(self, site: str, what: str) -> None:
        super().__init__(what)
        self.site = site


@dataclass(frozen=True, slots=True)
class Aggregated:
    """What a round came to: digests of the next global model, and of the strategy's slots where it has any."""

    model: Digest
    state: Digest | None = None


@dataclass(frozen=True, slots=True)
class Before:
    """What a round starts from.

    Attributes:
        model: the global model.
        state: the strategy's slots; None in the first round, or when it has none.
        round: training rounds that came before.
    """

    model: TensorReader
    state: TensorReader | None = None
    round: int = 0


def aggregate(
    strategy: Strategy,
    *,
    store: Store,
    before: Before,
    updates: Sequence[Accepted],
    factors: Mapping[str, float],
    target: str,
    state_target: str,
    arithmetic: Arithmetic = CURRENT,
) -> Aggregated:
    """Write the next global model, and the strategy's slots.

    Args:
        strategy: how.
        before: what the round starts from.
        updates: accepted ones; read in the order of their sites, whatever order they come in.
        factors: site -> factor on its weight; 1 for a site that is not named.
        target: path of the next global model in the store.
        state_target: path of the slots, which are written when the strategy has any.
        arithmetic: of the job.

    Returns: digests of what was written. When every weight is 0 model and slots stay as they are.

    Raises:
        RoundError: the aggregate is not finite, or the updates are not what the strategy needs.
        UpdateChanged: an update is not what the gate has seen.
    """
    ordered = arithmetic.by_site(updates, lambda update: update.site)
    steps = relative({update.manifest.site: update.weight for update in ordered})
    shares = relative({update.manifest.site: factors.get(update.manifest.site, 1.0) for update in ordered})
    weights = relative({site: steps[site] * shares[site] for site in steps})
    counted = [(update, weight) for update in ordered if (weight := weights[update.manifest.site])]
    base = before.model
    with ExitStack() as stack:
        executor = stack.enter_context(_threads())
        if counted and strategy.surveys:
            strategy = strategy.survey(_geometry(executor, base, counted, store.block_elements, arithmetic))
        slots = stack.enter_context(slot_file(beside_spec(strategy.slots, base.spec))) if strategy.slots else None
        with store.staged(target) as file:
            make = partial(_next_block, strategy, before, counted, slots, arithmetic)
            blocks = _in_order(executor, make, _blocks(base, store.block_elements))
            model = write_and_hash(file, base.spec, blocks)
        return Aggregated(model, None if slots is None else slots.save(store, state_target))


def _blocks(base: TensorReader, block_elements: int) -> Iterator["_Block"]:
    """The blocks of the global model in file order."""
    ranges = (block_ranges(name, base.spec[name].num_elements, block_elements) for name in file_order(base.spec))
    return starmap(partial(_Block, base), chain.from_iterable(ranges))


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute on one processor each: torch would have each of them use all, and wait for each other."""
    for_others = torch.get_num_threads()
    begun = threading.Barrier(_NUM_THREADS + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        begun.wait()

    executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fedpool-aggregate", initializer=begin)
    with executor:
        for _ in range(_NUM_THREADS):  # starts a thread each, as none is idle before all have begun
            executor.submit(int)
        begun.wait()
        torch.set_num_threads(for_others)  # what a thread sets holds for those begun later, too
        yield executor


def _in_order(
    executor: ThreadPoolExecutor, compute: Callable[["_Block"], _T], blocks: Iterator["_Block"]
) -> Iterator[_T]:
    """What is computed of every block, in their order; each thread computes a run of blocks.

    A run is long enough that handing it over costs little; one block at a time would cost more than it saves.
    """

    def compute_run(run: Sequence[_Block]) -> list[_T]:
        return [compute(block) for block in run]

    runs = _in_runs(blocks)
    under_way = deque(executor.submit(compute_run, run) for run in islice(runs, _NUM_THREADS + 1))
    while under_way:
        done = under_way.popleft().result()
        under_way.extend(executor.submit(compute_run, run) for run in islice(runs, 1))
        yield from done


def _geometry(
    executor: ThreadPoolExecutor,
    base: TensorReader,
    counted: Sequence[tuple[Accepted, float]],
    block_elements: int,
    arithmetic: Arithmetic,
) -> Geometry:
    """How the updates lie to each other: one pass over all of them."""
    products = torch.zeros(len(counted), len(counted), dtype=torch.float64)
    for parts in _in_order(executor, partial(_products, counted, arithmetic), _blocks(base, block_elements)):
        for part in parts:
            products += part
    return Geometry(tuple(update.site for update, _ in counted), tuple(weight for _, weight in counted), products)


def _products(counted: Sequence[tuple[Accepted, float]], arithmetic: Arithmetic, block: "_Block") -> list[torch.Tensor]:
    """One block's part of the inner products."""
    senders = [update for update, _ in counted if update.tensors and block.name in update.tensors.spec]
    if block.spec.kind != "float" or not senders:
        return []
    products = block_products if arithmetic.exact_products else blas_products
    return products([_UpdateSlice(block, update)[block.name] - block.wide for update in senders])


def _next_block(
    strategy: Strategy,
    before: Before,
    counted: Sequence[tuple[Accepted, float]],
    slots: SlotFile | None,
    arithmetic: Arithmetic,
    block: "_Block",
) -> BlockBytes:
    """One block of the next global model; that of the slots is put where they are collected."""
    name = block.name
    senders = [(update, weight) for update, weight in counted if update.tensors and name in update.tensors.spec]
    state = _state(strategy, before, block)
    made: BlockBytes = bytearray()
    if not senders:  # nobody sent it: excluded from the exchange, or only empty sites took part
        made = block.data
    else:
        updates = [_update(strategy, block, update, weight, arithmetic) for update, weight in senders]
        after, state = strategy.apply(state, updates)
        made = as_bytes(_narrow(after[name], block))
    if slots is not None:
        for slot, values in state.slots.items():
            if name in values:
                slots.put(beside(slot, name), block.start, values[name])
    return made


def _in_runs(blocks: Iterator["_Block"]) -> Iterator[list["_Block"]]:
    while run := list(islice(blocks, _RUN_BLOCKS)):
        yield run


def _state(strategy: Strategy, before: Before, block: "_Block") -> State:
    """A block of the state that a round starts from."""
    params = _GlobalSlice(block)
    averaged = frozenset() if is_trained(block.name, block.spec) else frozenset((block.name,))
    if not strategy.slots:
        return State(params, {}, before.round, averaged)
    if before.state is None:
        return replace(strategy.init(params, averaged), round=before.round)
    slots = {} if averaged else {slot: _BesideSlice(block, before.state, slot) for slot in strategy.slots}
    return State(params, slots, before.round, averaged)


def _update(strategy: Strategy, block: "_Block", update: Accepted, weight: float, arithmetic: Arithmetic) -> Update:
    """A block of an update."""
    assert update.tensors is not None
    extras: dict[str, Slice] = {}
    if strategy.extras and is_trained(block.name, block.spec):
        extras = {group: _BesideSlice(block, update.tensors, group, update.site) for group in strategy.extras}
    scale = update.scale if arithmetic.scaled_extras else 1.0
    return Update(update.site, weight, _UpdateSlice(block, update), extras, update.manifest.meta, scale)


class _Block:
    """A block of the global model, read when it is first asked for: a plain mean never asks."""

    def __init__(self, base: TensorReader, name: str, start: int, stop: int) -> None:
        self._base = base
        self.name = name
        self.start = start
        self.stop = stop
        self.spec = base.spec[name]

    @cached_property
    def data(self) -> BlockBytes:
        """Its bytes."""
        return self._base.read_block(self.name, self.start, self.stop)

    @cached_property
    def value(self) -> torch.Tensor:
        """The block in its own dtype."""
        return torch_block(self.data, self.spec.dtype)

    @cached_property
    def origin(self) -> torch.Tensor | None:
        """What integers are differences to: the block made even, so that halves are rounded to the same side as without."""
        return self.value.to(torch.int64) & ~1 if self.spec.kind == "int" else None

    @cached_property
    def wide(self) -> torch.Tensor:
        """The block as a strategy sees it."""
        return _widen(self.value, self.origin)


def _widen(value: torch.Tensor, origin: torch.Tensor | None) -> torch.Tensor:
    """float64 of a block; integers as differences to `origin`, because float64 holds no integer above 2**53 for sure."""
    return (value if origin is None else value.to(torch.int64) - origin).to(torch.float64)


def _narrow(value: torch.Tensor, block: _Block) -> torch.Tensor:
    """Back from float64: integers are rounded, a boolean is the majority's (a tie leaves it as it was)."""
    dtype = torch_dtype(block.spec.dtype)
    if block.spec.kind == "bool":
        return torch.where(value == 0.5, block.value, value > 0.5)
    if block.origin is not None:
        whole = block.origin + value.round().to(torch.int64)
        limits = torch.iinfo(dtype)
        if not (limits.min <= whole.min().item() and whole.max().item() <= limits.max):
            raise RoundError(
                f"the aggregate of {block.name} does not fit its dtype {block.spec.dtype}: its values are too large"
            )
        return whole.to(dtype)
    result = value.to(dtype)
    low, high = result.aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise RoundError(
            f"the aggregate of {block.name} is not finite, though every update was: their values are too large"
        )
    return result


class _LazySlice(Mapping[str, torch.Tensor]):
    """A slice of one block that is read when it is looked at, so that a mean holds one site's block at a time."""

    def __init__(self, block: _Block) -> None:
        self._block = block

    def __iter__(self) -> Iterator[str]:
        return iter((self._block.name,))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: str) -> torch.Tensor:
        if key != self._block.name:
            raise KeyError(key)
        return self._read()

    @abstractmethod
    def _read(self) -> torch.Tensor: ...


class _GlobalSlice(_LazySlice):
    """The global model's part of a block."""

    def _read(self) -> torch.Tensor:
        return self._block.wide


class _BesideSlice(_LazySlice):
    """What lies beside a block: in the strategy's slots, or in the update of a site."""

    def __init__(self, block: _Block, tensors: TensorReader, group: str, site: str | None = None) -> None:
        super().__init__(block)
        self._tensors = tensors
        self._group = group
        self._site = site

    def _read(self) -> torch.Tensor:
        block = self._block
        try:
            return read_wide(self._tensors, beside(self._group, block.name), block.start, block.stop)
        except (IntegrityError, FileNotFoundError) as error:
            if self._site is None:
                raise
            raise UpdateChanged(self._site, str(error)) from error


class _UpdateSlice(_LazySlice):
    """One update's part of a block."""

    def __init__(self, block: _Block, update: Accepted) -> None:
        super().__init__(block)
        self._update = update
        # What limits a difference limits its floating point numbers.
        self._scale = update.scale if block.spec.kind == "float" else 1.0

    def _read(self) -> torch.Tensor:
        block, tensors = self._block, self._update.tensors
        assert tensors is not None
        code = tensors.spec[block.name].dtype
        try:
            data = tensors.read_block(block.name, block.start, block.stop)
        except (IntegrityError, FileNotFoundError) as error:
            raise UpdateChanged(self._update.site, str(error)) from error
        value = torch_block(data, code)
        # A boolean has no difference: a DIFF carries the site's own value.
        if self._update.manifest.params_type == "DIFF" and code != "BOOL":
            return value.to(torch.float64) * self._scale + block.wide
        full = _widen(value, block.origin)
        return full if self._scale == 1.0 else block.wide + (full - block.wide) * self._scale
