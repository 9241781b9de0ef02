"""Filters change updates on their way between a site's host and the gate.

`outgoing` runs in the site's host (not in its script), before the update is hashed and stored.
`incoming` runs at the coordinator, before the gate checks any value, and undoes what can be undone.
The transmitted tensors may have other names, dtypes and shapes than the model; after `incoming`
they have the model's. Both methods take and return tensors that are read block by block, so memory
stays bounded. The idea is pfl-research's `Postprocessor` (https://github.com/apple/pfl-research).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import ConfigDict

from fedpool.arrays import CHUNK_ELEMENTS, as_bytes, torch_block, torch_dtype
from fedpool.errors import FilterError, ModelChanged
from fedpool.fields import Checked
from fedpool.own_failures import OWN_FAILURES
from fedpool.tensors import ITEM_SIZES, METADATA, BlockBytes, Spec, Tensors, TensorSpec, is_beside, split_beside

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class BlockRange:
    """The elements of a block: `start` to `stop` of the tensor `name`, flattened in C order."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class FilterContext:
    """The only information that a filter gets about where it runs.

    Attributes:
        site: the update's site.
        round: from 0.
        seed: for random numbers, in [0, 2**63): a function of the job's seed, the site, the round
            and the filter's position in the recipe. The coordinator knows it, so noise that should
            hide something from the coordinator needs another source.
        base: the round's global model, which the site and the coordinator both have.
    """

    site: str
    round: int
    seed: int
    base: Tensors

    def model_spec(self, name: str) -> TensorSpec | None:
        """dtype and shape of the parameter that a tensor is or lies beside, or None."""
        return self.base.spec.get(split_beside(name)[1] if is_beside(name) else name)

    def draw(self, block: BlockRange, sample: "Callable[[int, torch.Generator], torch.Tensor]") -> "torch.Tensor":
        """Random numbers for the elements of a block, independent of the block size of the store.

        Args:
            sample: (count, generator) -> that many numbers, such as `lambda n, g: torch.randn(n,
                generator=g)`.
        """
        import torch

        first = block.start // CHUNK_ELEMENTS
        drawn = []
        for chunk in range(first, -(-block.stop // CHUNK_ELEMENTS)):
            digest = hashlib.sha256(f"{self.seed}/{chunk}/{block.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            drawn.append(sample(CHUNK_ELEMENTS, generator))
        offset = block.start - first * CHUNK_ELEMENTS
        return torch.cat(drawn)[offset : offset + block.stop - block.start]


class Filter(Checked):
    """Base of filters: a frozen pydantic model, whose fields have descriptions, like a recipe's.

    Both methods must give the same result for the same arguments, read the update block by block,
    and support calls from several threads at once. Their exceptions are reported with the filter's
    name: the site fails, or the update is rejected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    growth: ClassVar[float] = 1.0
    """Limit on the transmitted size, as a multiple of the largest update without filters."""

    def outgoing(self, update: Tensors, context: FilterContext) -> Tensors:
        """The tensors to transmit.

        Args:
            update: parameters or their difference to `context.base`, and the tensors beside them.
        """
        return update

    def incoming(self, update: Tensors, context: FilterContext) -> Tensors:
        """The original update, with the model's names and shapes, from the transmitted tensors."""
        return update


class ElementwiseFilter(Filter):
    """Base of filters that handle each value of floating point tensors separately.

    That includes tensors beside parameters. Tensors of other dtypes pass unchanged.
    """

    def wire_dtype(self, name: str, spec: TensorSpec) -> str:
        """dtype in which a tensor is transmitted, as a safetensors name.

        Args:
            spec: the model's parameter that the tensor is or lies beside.
        """
        return spec.dtype

    def outgoing_values(self, values: "torch.Tensor", block: BlockRange, context: FilterContext) -> "torch.Tensor":
        """A block's values to transmit: flat, of the same length, convertible to `wire_dtype`."""
        return values

    def incoming_values(self, values: "torch.Tensor", block: BlockRange, context: FilterContext) -> "torch.Tensor":
        """The original block; converted to the model's dtype if `wire_dtype` changed that."""
        return values

    def outgoing(self, update: Tensors, context: FilterContext) -> Tensors:
        def dtype(name: str, entry: TensorSpec, known: TensorSpec) -> str:
            wire = self.wire_dtype(name, known)
            return entry.dtype if wire == known.dtype else wire

        return self._each(update, context, self.outgoing_values, dtype)

    def incoming(self, update: Tensors, context: FilterContext) -> Tensors:
        def dtype(name: str, entry: TensorSpec, known: TensorSpec) -> str:
            return entry.dtype if self.wire_dtype(name, known) == known.dtype else known.dtype

        return self._each(update, context, self.incoming_values, dtype)

    def _each(
        self,
        update: Tensors,
        context: FilterContext,
        change: "Callable[[torch.Tensor, BlockRange, FilterContext], torch.Tensor]",
        dtype: Callable[[str, TensorSpec, TensorSpec], str],
    ) -> Tensors:
        changed = {
            name: TensorSpec(dtype(name, entry, known), entry.shape)
            for name, entry in update.spec.items()
            if (known := context.model_spec(name)) is not None and known.kind == "float"
        }

        def read(name: str, start: int, stop: int) -> BlockBytes:
            data = update.read_block(name, start, stop)
            if name not in changed:
                return data
            values = change(torch_block(data, update.spec[name].dtype), BlockRange(name, start, stop), context)
            return as_bytes(values.to(torch_dtype(changed[name].dtype)))

        return ComputedTensors({**update.spec, **changed}, read)


@dataclass(frozen=True, slots=True)
class ComputedTensors:
    """Tensors whose blocks are computed when they are read.

    Attributes:
        spec: dtypes and shapes of the computed tensors.
        read: (name, start, stop) -> the bytes of those elements; see `Tensors.read_block`.
    """

    spec: Spec
    read: Callable[[str, int, int], BlockBytes]

    def read_block(self, name: str, start: int, stop: int) -> BlockBytes:
        """See `Tensors.read_block`."""
        return self.read(name, start, stop)


def type_of_filter(filter: Filter) -> str:
    """A filter's class, `module:Class`."""
    return f"{type(filter).__module__}:{type(filter).__qualname__}"


def described(filters: Sequence[Filter]) -> tuple[dict[str, Any], ...]:
    """Filters as JSON, also for manifests and records: the class under `type`, and the fields."""
    return tuple({"type": type_of_filter(filter), **filter.model_dump(mode="json")} for filter in filters)


@dataclass(frozen=True, slots=True)
class Passage:
    """The passage of one update through the filters: its site and round.

    Attributes:
        seed: the job's.
        base: the round's global model.
    """

    site: str
    round: int
    seed: int
    base: Tensors

    def send(self, filters: Sequence[Filter], update: Tensors) -> Tensors:
        """The tensors to transmit: the result of each filter's `outgoing`, in order.

        Raises:
            FilterError: a filter failed; reading a block also raises this.
        """
        for index, filter in enumerate(filters):
            update = _guarded(filter, filter.outgoing, update, self._context(index))
        return update

    def take_back(self, filters: Sequence[Filter], update: Tensors) -> Tensors:
        """The original update: the result of each filter's `incoming`, in reverse order.

        Raises:
            FilterError: a filter failed; reading a block also raises this.
        """
        for index, filter in reversed(list(enumerate(filters))):
            update = _guarded(filter, filter.incoming, update, self._context(index))
        return update

    def _context(self, index: int) -> FilterContext:
        digest = hashlib.sha256(f"filter {index}/{self.seed}/{self.site}/{self.round}".encode()).digest()
        return FilterContext(self.site, self.round, int.from_bytes(digest[:8], "big") >> 1, self.base)


class _Below(Exception):
    """The filter's input could not be read, which isn't the filter's error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _guarded(
    filter: Filter,
    step: Callable[[Tensors, FilterContext], Tensors],
    update: Tensors,
    context: FilterContext,
) -> Tensors:
    """A filter's result for an update. The filter's errors get its name."""

    def below(name: str, start: int, stop: int) -> BlockBytes:
        try:
            return update.read_block(name, start, stop)
        except Exception as error:
            raise _Below(error) from error

    def read(name: str, start: int, stop: int) -> BlockBytes:
        data = _told(filter, lambda: memoryview(made.read_block(name, start, stop)).cast("B"))
        wanted = (stop - start) * ITEM_SIZES[spec[name].dtype]
        if len(data) != wanted:
            raise FilterError(
                type(filter).__name__,
                f"{name}: {len(data)} bytes, but {spec[name]} has {wanted} for elements {start} to {stop}",
            )
        return data if not data.readonly else memoryview(bytearray(data))

    made = _told(filter, lambda: step(ComputedTensors(update.spec, below), context))
    spec = _told(filter, lambda: _checked(made.spec))
    return ComputedTensors(spec, read)


def _checked(spec: Spec) -> Spec:
    """A filter's spec, if a file can have tensors like that; raises a `ValueError` if not."""
    for name, entry in spec.items():
        if not isinstance(name, str) or name == METADATA:
            why = "safetensors keeps that name for itself" if name == METADATA else "a name is text"
            raise ValueError(f"a tensor cannot be called {name!r}, because {why}: give it another name")
        if entry.dtype not in ITEM_SIZES:
            raise ValueError(f"{name} has dtype {entry.dtype!r}: use one of {', '.join(ITEM_SIZES)}")
        if not isinstance(entry.shape, tuple) or not all(type(size) is int and size >= 0 for size in entry.shape):
            raise ValueError(f"{name} has shape {entry.shape!r}: use a tuple of whole numbers from 0")
    return dict(spec)


def _told(filter: Filter, work: Callable[[], _T]) -> _T:
    try:
        return work()
    except _Below as below:
        raise below.error from below
    except ModelChanged:  # the filter has read it
        raise
    except OWN_FAILURES as error:
        raise FilterError(type(filter).__name__, f"{type(error).__name__}: {error}") from error
