"""Aggregation as a stream: block by block, the strategy turns the sites' updates into the next global model in the store.

At no time is there more in memory than one block of the global model, of one update and of what the strategy computes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from fedpool.arrays import as_bytes, torch_block, torch_dtype
from fedpool.errors import RoundError
from fedpool.store import Store
from fedpool.tasks.gate import Accepted
from fedpool.tasks.strategy import Strategy, Update
from fedpool.tensors import Digest, TensorReader, TensorSpec, block_ranges, file_order, write_and_hash


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
    """
    ordered = sorted(updates, key=lambda update: update.manifest.site)
    weights = {update.manifest.site: update.weight * factors.get(update.manifest.site, 1.0) for update in ordered}
    heaviest = max(weights.values(), default=0.0)
    # Weights are relative. Relative to the heaviest, their sum cannot overflow.
    counted = [
        (update, weights[update.manifest.site] / heaviest)
        for update in ordered
        if heaviest and weights[update.manifest.site]
    ]
    with store.staged(target) as file:
        return write_and_hash(file, base.spec, _next_blocks(strategy, base, counted, store.block_elements))


def _next_blocks(
    strategy: Strategy, base: TensorReader, counted: Sequence[tuple[Accepted, float]], block_elements: int
) -> Iterator[memoryview | bytearray]:
    """The next global model, block by block in file order. On one thread: several spent more on handing over than they saved."""
    ranges = (block_ranges(name, base.spec[name].num_elements, block_elements) for name in file_order(base.spec))
    for name, start, stop in chain.from_iterable(ranges):
        data = base.read_block(name, start, stop)
        senders = [(update, weight) for update, weight in counted if update.tensors and name in update.tensors.spec]
        if not senders:  # nobody sent it: excluded from the exchange, or only empty sites took part
            yield data
            continue
        spec = base.spec[name]
        before = torch_block(data, spec.dtype)
        wide = before.to(torch.float64)
        slices = [
            Update(update.manifest.site, weight, _LazySlice(update, name, start, stop, wide))
            for update, weight in senders
        ]
        after, _ = strategy.apply(strategy.init({name: wide}), slices)
        yield as_bytes(_narrow(after[name], before, spec, name))


def _narrow(value: torch.Tensor, before: torch.Tensor, spec: TensorSpec, name: str) -> torch.Tensor:
    """Back from float64: integers are rounded, a boolean is the majority's (a tie leaves it as it was)."""
    kind = spec.kind
    if kind == "bool":
        return torch.where(value == 0.5, before, value > 0.5)
    result = (value.round() if kind == "int" else value).to(torch_dtype(spec.dtype))
    if kind == "float":
        low, high = result.aminmax()
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise RoundError(
                f"the aggregate of {name} is not finite, though every update was: their values are too large"
            )
    return result


@dataclass(frozen=True, slots=True)
class _LazySlice(Mapping[str, torch.Tensor]):
    """A slice of one update that is read when it is looked at, so that a mean holds one site's block at a time."""

    update: Accepted
    name: str
    start: int
    stop: int
    base: torch.Tensor

    def __getitem__(self, key: str) -> torch.Tensor:
        if key != self.name:
            raise KeyError(key)
        tensors = self.update.tensors
        assert tensors is not None
        code = tensors.spec[key].dtype
        value = torch_block(tensors.read_block(key, self.start, self.stop), code).to(torch.float64)
        # A boolean has no difference: a DIFF carries the site's own value.
        if self.update.manifest.params_type == "DIFF" and code != "BOOL":
            value += self.base
        return value

    def __iter__(self) -> Iterator[str]:
        return iter((self.name,))

    def __len__(self) -> int:
        return 1
