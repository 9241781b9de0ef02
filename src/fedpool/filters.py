"""Filters: what is done to an update between a site's host and the gate.

`outgoing` runs at the site, in its host and not in its script, on what is about to be hashed and
put into the store; `incoming` undoes at the coordinator what can be undone, before the gate looks
at a value. What travels may have other names, dtypes and shapes than the model; after `incoming` it
has the model's. Both are given tensors that are read block by block, and give such tensors, so that
memory stays bounded (the idea is pfl-research's `Postprocessor`,
https://github.com/apple/pfl-research).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import ConfigDict

from fedpool.arrays import CHUNK_ELEMENTS, as_bytes, torch_block, torch_dtype
from fedpool.errors import FilterError
from fedpool.fields import Checked
from fedpool.tensors import ITEM_SIZES, BlockBytes, Spec, Tensors, TensorSpec, is_beside, split_beside

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Which elements of which tensor a block holds: `start` to `stop` of `name`, flattened in C
    order.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class FilterContext:
    """All that a filter may know of where it runs.

    Attributes:
        site: whose update it is.
        round: from 0.
        seed: for whatever is random, in [0, 2**63): a function of the job's seed, site, round and
            the filter's place among the recipe's. The coordinator knows it, so noise that is to
            hide something from the coordinator needs another source.
        base: the round's global model, which site and coordinator have.
    """

    site: str
    round: int
    seed: int
    base: Tensors

    def model_spec(self, name: str) -> TensorSpec | None:
        """dtype and shape of the parameter that a tensor is of, or lies beside; None when the
        model has none of that name.
        """
        return self.base.spec.get(split_beside(name)[1] if is_beside(name) else name)

    def draw(self, block: BlockRange, sample: "Callable[[int, torch.Generator], torch.Tensor]") -> "torch.Tensor":
        """Random numbers for the elements of a block: the same ones whatever blocks a store is read
        in.

        Args:
            sample: (how many, generator) -> as many numbers, such as `lambda n, g: torch.randn(n,
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
    """Base of filters: a frozen pydantic model, whose fields have descriptions, as a recipe's have.

    Both methods give the same for the same arguments, read what they need of the update block by
    block, and are called from several threads at once. Whatever they raise is told with the
    filter's name: the site fails, or the update is rejected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    growth: ClassVar[float] = 1.0
    """How many times larger than the largest update of the model what travels may be; more is
    refused unread.
    """

    def outgoing(self, update: Tensors, context: FilterContext) -> Tensors:
        """What travels, of an update: parameters or their difference to `context.base`, and what
        lies beside them.
        """
        return update

    def incoming(self, update: Tensors, context: FilterContext) -> Tensors:
        """The update again, with the names and shapes of the model, of what has travelled."""
        return update


class ElementwiseFilter(Filter):
    """Base of filters that look at each value for itself: floating point tensors, those beside
    parameters too; others pass.
    """

    def wire_dtype(self, name: str, spec: TensorSpec) -> str:
        """dtype in which a tensor travels, by its safetensors name.

        Args:
            spec: of the parameter of the model that it is of, or lies beside.
        """
        return spec.dtype

    def outgoing_values(self, values: "torch.Tensor", block: BlockRange, context: FilterContext) -> "torch.Tensor":
        """What travels, of a block: flat, as long as it, and of a dtype that becomes
        `wire_dtype`.
        """
        return values

    def incoming_values(self, values: "torch.Tensor", block: BlockRange, context: FilterContext) -> "torch.Tensor":
        """The block again, of what has travelled; it takes the model's dtype if `wire_dtype` has
        changed that.
        """
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
        spec: of what comes of it.
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
    """Filters as JSON holds them, in manifests and records too: the class under `type`, and the
    fields.
    """
    return tuple({"type": type_of_filter(filter), **filter.model_dump(mode="json")} for filter in filters)


@dataclass(frozen=True, slots=True)
class Passage:
    """Whose update passes the filters, and in which round.

    Attributes:
        seed: of the job.
        base: the round's global model.
    """

    site: str
    round: int
    seed: int
    base: Tensors

    def send(self, filters: Sequence[Filter], update: Tensors) -> Tensors:
        """What travels: each filter's `outgoing`, in order.

        Raises:
            FilterError: a filter failed; also from reading a block.
        """
        for index, filter in enumerate(filters):
            update = _guarded(filter, filter.outgoing, update, self._context(index))
        return update

    def take_back(self, filters: Sequence[Filter], update: Tensors) -> Tensors:
        """The update again: each filter's `incoming`, in reverse order.

        Raises:
            FilterError: a filter failed; also from reading a block.
        """
        for index, filter in reversed(list(enumerate(filters))):
            update = _guarded(filter, filter.incoming, update, self._context(index))
        return update

    def _context(self, index: int) -> FilterContext:
        digest = hashlib.sha256(f"filter {index}/{self.seed}/{self.site}/{self.round}".encode()).digest()
        return FilterContext(self.site, self.round, int.from_bytes(digest[:8], "big") >> 1, self.base)


class _Below(Exception):
    """What a filter reads could not be read: that is no error of the filter's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _guarded(
    filter: Filter,
    step: Callable[[Tensors, FilterContext], Tensors],
    update: Tensors,
    context: FilterContext,
) -> Tensors:
    """What a filter makes of an update, its errors with its name."""

    def below(name: str, start: int, stop: int) -> BlockBytes:
        try:
            return update.read_block(name, start, stop)
        except Exception as error:
            raise _Below(error) from error

    def read(name: str, start: int, stop: int) -> BlockBytes:
        data = memoryview(_told(filter, lambda: made.read_block(name, start, stop))).cast("B")
        wanted = (stop - start) * ITEM_SIZES[spec[name].dtype]
        if len(data) != wanted:
            raise FilterError(
                type(filter).__name__,
                f"{name}: {len(data)} bytes where {spec[name]} has {wanted} from {start} to {stop}",
            )
        return data if not data.readonly else memoryview(bytearray(data))

    made = _told(filter, lambda: step(ComputedTensors(update.spec, below), context))
    spec = _told(filter, lambda: _checked(made.spec))
    return ComputedTensors(spec, read)


def _checked(spec: Spec) -> Spec:
    for name, entry in spec.items():
        if entry.dtype not in ITEM_SIZES:
            raise ValueError(f"{name} has dtype {entry.dtype!r}: there are {', '.join(ITEM_SIZES)}")
    return dict(spec)


def _told(filter: Filter, work: Callable[[], _T]) -> _T:
    try:
        return work()
    except _Below as below:
        raise below.error from below
    except Exception as error:  # it is the user's code
        raise FilterError(type(filter).__name__, f"{type(error).__name__}: {error}") from error
