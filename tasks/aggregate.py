"""Aggregation as a stream: block by block, the strategy turns the sites' updates into the next global model in the store.

At no time is there more in memory than one block of the global model, of one update and of what the strategy computes.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, starmap

import torch

from fedpool.arrays import as_bytes, torch_block, torch_dtype
from fedpool.errors import IntegrityError, RoundError
from fedpool.store import Store
from fedpool.tasks.gate import Accepted
from fedpool.tasks.strategy import Strategy, Update
from fedpool.tensors import Digest, TensorReader, block_ranges, file_order, write_and_hash


class UpdateChanged(IntegrityError):
    """An update is not what the gate has seen: `site` has changed it since, or the store is damaged."""

    def __init__(self, site: str, what: str) -> None:
        super().__init__(what)
        self.site = site


def aggregate(
    strategy: Strategy,
    *,
    store: Store,
    base: TensorReader,
    updates: Sequence[Accepted],
    factors: Mapping[str, float],
    target: str,
) -> Digest:
    """Write the next global model.

    Args:
        strategy: how.
        base: the round's global model.
        updates: accepted ones; read in sorted site order, whatever order they come in.
        factors: site -> factor on its weight; 1 for a site that is not named.
        target: path of the next global model in the store.

    Returns: sha256 and size of what was written. When every weight is 0 the model stays as it is.

    Raises:
        RoundError: the aggregate is not finite.
        UpdateChanged: an update is not what the gate has seen.
    """
    ordered = sorted(updates, key=lambda update: update.manifest.site)
    # Weights are relative. Relative to the heaviest, neither their products nor their sum can overflow.
    steps = _relative({update.manifest.site: update.weight for update in ordered})
    shares = _relative({update.manifest.site: factors.get(update.manifest.site, 1.0) for update in ordered})
    weights = {site: steps[site] * shares[site] for site in steps}
    heaviest = max(weights.values(), default=0.0)
    counted = [
        (update, weights[update.manifest.site] / heaviest)
        for update in ordered
        if heaviest and weights[update.manifest.site]
    ]
    with store.staged(target) as file:
        return write_and_hash(file, base.spec, _next_blocks(strategy, base, counted, store.block_elements))


def _relative(weights: Mapping[str, float]) -> dict[str, float]:
    heaviest = max(weights.values(), default=0.0)
    return {site: weight / heaviest if heaviest else 0.0 for site, weight in weights.items()}


def _next_blocks(
    strategy: Strategy, base: TensorReader, counted: Sequence[tuple[Accepted, float]], block_elements: int
) -> Iterator[memoryview | bytearray]:
    """The next global model, block by block in file order. On one thread: several spent more on handing over than they saved."""
    ranges = (block_ranges(name, base.spec[name].num_elements, block_elements) for name in file_order(base.spec))
    for block in starmap(partial(_Block, base), chain.from_iterable(ranges)):
        name = block.name
        senders = [(update, weight) for update, weight in counted if update.tensors and name in update.tensors.spec]
        if not senders:  # nobody sent it: excluded from the exchange, or only empty sites took part
            yield block.data
            continue
        slices = [Update(update.manifest.site, weight, _UpdateSlice(block, update)) for update, weight in senders]
        after, _ = strategy.apply(strategy.init(_GlobalSlice(block)), slices)
        yield as_bytes(_narrow(after[name], block))


class _Block:
    """A block of the global model, read when it is first asked for: a plain mean never asks."""

    def __init__(self, base: TensorReader, name: str, start: int, stop: int) -> None:
        self._base = base
        self.name = name
        self.start = start
        self.stop = stop
        self.spec = base.spec[name]

    @cached_property
    def data(self) -> bytearray:
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
