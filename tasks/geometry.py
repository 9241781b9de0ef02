"""The geometry of a round's updates: inner products of their differences to the global model.

Distances between updates, and between an update and any weighted mean of them, follow from the
inner products alone. So rules that compare whole updates (Krum, Bulyan, the geometric median) need
only one pass over them, block by block, and a small matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedpool.arrays import chunks

_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Geometry:
    """The inner products of n updates.

    Attributes:
        sites: the senders, in the order of the matrix; for a late update, its key (see `Update`).
        weights: of the updates, in the same order, above 0; see `Update`.
        products: (n, n), float64; [i, j] is the inner product of the differences of updates i and j
            to the global model, over all floating point parameters that they share.
    """

    sites: tuple[str, ...]
    weights: tuple[float, ...]
    products: torch.Tensor

    @property
    def norms(self) -> torch.Tensor:
        """(n,) L2 norms of the differences to the global model."""
        return self.products.diagonal().sqrt()

    @property
    def squared_distances(self) -> torch.Tensor:
        """(n, n) squared L2 distances between updates; never negative, and 0 on the diagonal."""
        squares = self.products.diagonal()
        distances = (squares[:, None] + squares[None, :] - 2 * self.products).clamp(min=0)
        # NaN is infinity minus infinity: a distance too large to be squared.
        return distances.nan_to_num(nan=torch.inf).fill_diagonal_(0)


def block_products(differences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(n, n) inner products of n updates' differences to the global model, each a flat float64
    tensor.

    Symmetric to the bit, so that equally placed updates are tied. The same on every processor,
    because products and pairwise sums are in an order that is fixed here; the order within a matrix
    product is up to the library.

    Returns: the products of each chunk of the block, to be added in order.
    """
    return [_products(chunk) for chunk in chunks(torch.stack(list(differences)))]


def blas_products(differences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Like `block_products`, but as a matrix product, as in earlier versions."""
    return [chunk @ chunk.T for chunk in chunks(torch.stack(list(differences)))]


def _products(chunk: torch.Tensor) -> torch.Tensor:
    """(n, n) inner products of the rows of a chunk, (n, elements)."""
    n, num_elements = chunk.shape
    wide = torch.zeros(n, 1 << max(0, num_elements - 1).bit_length(), dtype=chunk.dtype)
    wide[:, :num_elements] = chunk
    # Each pair once. Halves are added to each other down to a width that is handled for all pairs
    # at once.
    parts = torch.cat([_halved(wide[row:] * wide[row], _TOGETHER) for row in range(n)])
    found = torch.empty(n, n, dtype=chunk.dtype)
    row, column = torch.triu_indices(n, n).unbind()
    found[row, column] = found[column, row] = _halved(parts, 1).squeeze(1)
    return found


def _halved(values: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, at most `width`) partial sums of (rows, a power of two) values, by adding halves."""
    while values.shape[1] > width:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values
