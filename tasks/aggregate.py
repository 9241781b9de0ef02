"""Aggregates in a stream: a strategy turns updates into the next global model, block by block.

Memory never holds more than one block of the global model, of one update (of each, for a strategy
that compares them), and of the strategy's results.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, starmap
from typing import TypeVar

import torch

from fedpool.arrays import as_bytes
from fedpool.checked import BlockTags
from fedpool.store import Store
from fedpool.tasks.arithmetic import CURRENT, Arithmetic
from fedpool.tasks.blocks import Block, narrow
from fedpool.tasks.gate import Accepted
from fedpool.tasks.geometry import Geometry, blas_products, block_products
from fedpool.tasks.guarded import applied, begun, slots_of, surveyed
from fedpool.tasks.slices import BesideSlice, GlobalSlice, UpdateSlice
from fedpool.tasks.slots import SlotFile, beside_spec, slot_file
from fedpool.tasks.strategy import Shares, Slice, State, Strategy, Update
from fedpool.tasks.used import job_shares
from fedpool.tasks.weighing import in_their_order, with_weights
from fedpool.tensor_stream import write_and_hash
from fedpool.tensors import BlockBytes, Digest, Tensors, beside, block_ranges, file_order, is_trained

_NUM_THREADS = min(4, os.cpu_count() or 1)
_RUN_BLOCKS = 4
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The result of a round.

    Attributes:
        model: digest of the next global model.
        state: digest of the slots, if any.
        model_tags: of the model's blocks, from when they were written; likewise `state_tags`.
    """

    model: Digest
    state: Digest | None = None
    model_tags: BlockTags | None = field(default=None, compare=False, repr=False)
    state_tags: BlockTags | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Before:
    """The state that a round starts from.

    Attributes:
        model: the global model.
        state: the strategy's slots; None in the first round, or if it has none.
        round: number of earlier training rounds.
        holes: names of the tensors in which the global model may hold infinities; see
            `fedpool.tasks.holes`.
        weights: site -> weight of its first update with a weight above 0, in the earlier rounds; 0
            if it has had none.
        shares: see `State`; set by `aggregate`.
    """

    model: Tensors
    state: Tensors | None = None
    round: int = 0
    holes: frozenset[str] = frozenset()
    weights: Mapping[str, float] = field(default_factory=dict)
    shares: Shares = field(default_factory=Shares)


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
    """Write the next global model and the strategy's slots.

    Args:
        strategy: turns the updates into the model.
        before: the state that the round starts from.
        updates: accepted updates, in any order; read in site order, a site's late one first.
        factors: site -> factor on its weight; 1 for a site that isn't named.
        target: path of the next global model in the store.
        state_target: path of the slots, which are written if the strategy has any.
        arithmetic: of the job.

    Returns: digests of the written objects. If every weight is 0, model and slots stay as they are.

    Raises:
        ModelChanged: the global model or the slots aren't the committed ones.
        RoundError: the aggregate is not finite, or the strategy can't use the updates.
        UpdateChanged: an update has changed since the gate checked it.
    """
    ordered = in_their_order(updates, arithmetic)
    counted = with_weights(ordered, factors, arithmetic)
    before = replace(before, shares=job_shares(before.weights, {u.site: u.weight for u in ordered}, factors))
    base = before.model
    with ExitStack() as stack:
        executor = stack.enter_context(_threads())
        if counted and strategy.surveys:
            geometry = _geometry(executor, before, counted, store.block_elements, arithmetic)
            strategy = surveyed(strategy, geometry)
        slots = None
        if strategy.slots:
            slots = stack.enter_context(slot_file(beside_spec(strategy.slots, base.spec), store.block_elements))
        tags = BlockTags(base.spec, store.block_elements)
        with store.staged(target) as file:
            make = partial(_next_block, strategy, before, counted, slots, tags, arithmetic)
            blocks = _in_order(executor, make, _blocks(before, store.block_elements))
            model = write_and_hash(file, base.spec, blocks)
        if slots is None:
            return Aggregated(model, model_tags=tags)
        return Aggregated(model, slots.save(store, state_target), tags, slots.tags)


def _blocks(before: Before, block_elements: int) -> Iterator[Block]:
    """The blocks of the global model in file order."""
    base = before.model
    ranges = (block_ranges(name, base.spec[name].num_elements, block_elements) for name in file_order(base.spec))
    return starmap(partial(Block, base, before.holes), chain.from_iterable(ranges))


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute on one processor each; by default, torch uses all in each of them."""
    for_others = torch.get_num_threads()
    begun = threading.Barrier(_NUM_THREADS + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        begun.wait()

    executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fedpool-aggregate", initializer=begin)
    with executor:
        for _ in range(_NUM_THREADS):  # starts one thread each, because none is idle before all have started
            executor.submit(int)
        begun.wait()
        torch.set_num_threads(for_others)  # a thread's setting also applies to threads started later
        yield executor


def _in_order(executor: ThreadPoolExecutor, compute: Callable[[Block], _T], blocks: Iterator[Block]) -> Iterator[_T]:
    """The results for all blocks, in order; each thread computes a run of blocks.

    A run is long enough that handing it over costs little. Single blocks would cost more than they
    save.
    """

    def compute_run(run: Sequence[Block]) -> list[_T]:
        return [compute(block) for block in run]

    runs = _in_runs(blocks)
    under_way = deque(executor.submit(compute_run, run) for run in islice(runs, _NUM_THREADS + 1))
    while under_way:
        done = under_way.popleft().result()
        under_way.extend(executor.submit(compute_run, run) for run in islice(runs, 1))
        yield from done


def _geometry(
    executor: ThreadPoolExecutor,
    before: Before,
    counted: Sequence[tuple[Accepted, float]],
    block_elements: int,
    arithmetic: Arithmetic,
) -> Geometry:
    """The geometry of the updates, from one pass over all of them."""
    products = torch.zeros(len(counted), len(counted), dtype=torch.float64)
    for parts in _in_order(executor, partial(_products, counted, arithmetic), _blocks(before, block_elements)):
        for part in parts:
            products += part
    return Geometry(tuple(update.key for update, _ in counted), tuple(weight for _, weight in counted), products)


def _products(counted: Sequence[tuple[Accepted, float]], arithmetic: Arithmetic, block: Block) -> list[torch.Tensor]:
    """One block's part of the inner products."""
    senders = [update for update, _ in counted if update.tensors and block.name in update.tensors.spec]
    if block.spec.kind != "float" or not senders:
        return []
    products = block_products if arithmetic.exact_products else blas_products
    return products([UpdateSlice(block, update)[block.name] - block.wide for update in senders])


def _next_block(
    strategy: Strategy,
    before: Before,
    counted: Sequence[tuple[Accepted, float]],
    slots: SlotFile | None,
    tags: BlockTags,
    arithmetic: Arithmetic,
    block: Block,
) -> BlockBytes:
    """One block of the next global model; takes its tag. Puts the slots' block into `slots`."""
    name = block.name
    senders = [(update, weight) for update, weight in counted if update.tensors and name in update.tensors.spec]
    state = _state(strategy, before, block)
    made: BlockBytes = bytearray()
    if not senders:  # no site sent it: it is excluded, or only sites without data took part
        made = block.data
    else:
        updates = [_update(strategy, block, update, weight, arithmetic) for update, weight in senders]
        state, value = applied(strategy, state, updates, block)
        made = as_bytes(_with_holes(narrow(value, block), block, [update for update, _ in senders]))
    if slots is not None:
        for slot, value in slots_of(strategy, state, block):
            slots.put(beside(slot, name), block.start, value)
    tags.take(name, block.start, made)
    return made


def _in_runs(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    while run := list(islice(blocks, _RUN_BLOCKS)):
        yield run


def _state(strategy: Strategy, before: Before, block: Block) -> State:
    """A block of the state that a round starts from."""
    params = GlobalSlice(block)
    averaged = frozenset() if is_trained(block.name, block.spec) else frozenset((block.name,))
    if not strategy.slots:
        return State(params, {}, before.round, averaged, before.shares)
    if before.state is None:
        return replace(begun(strategy, params, averaged, block), round=before.round, shares=before.shares)
    slots = {} if averaged else {slot: BesideSlice(block, before.state, slot) for slot in strategy.slots}
    return State(params, slots, before.round, averaged, before.shares)


def _update(strategy: Strategy, block: Block, update: Accepted, weight: float, arithmetic: Arithmetic) -> Update:
    """A block of an update."""
    assert update.tensors is not None
    extras: dict[str, Slice] = {}
    if strategy.extras and is_trained(block.name, block.spec):
        extras = {group: BesideSlice(block, update.tensors, group, update) for group in strategy.extras}
    scale = update.scale if arithmetic.scaled_extras else 1.0
    params = UpdateSlice(block, update)
    return Update(update.site, weight, params, extras, update.manifest.meta, scale, update.staleness)


def _with_holes(made: torch.Tensor, block: Block, updates: Sequence[Accepted]) -> torch.Tensor:
    """The next block with the holes that remain: those that any update leaves unchanged."""
    if block.holes is None:
        return made
    kept = torch.zeros_like(block.holes)
    for update in updates:
        kept |= UpdateSlice(block, update).unchanged(block.holes)
    return torch.where(kept, block.value, made)
