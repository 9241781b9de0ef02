"""How the updates of a round lie to each other: the inner products of their differences to the global model.

Distances between updates, and between an update and any weighted mean of them, follow from the inner products alone. So rules
that look at whole updates (Krum, Bulyan, the geometric median) need one pass over them, block by block, and a small matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedpool.arrays import chunks


@dataclass(frozen=True, slots=True)
class Geometry:
    """The inner products of n updates.

    Attributes:
        sites: who sent them, in the order of the matrix.
        weights: of the updates, in the same order, above 0.
        products: (n, n), float64; [i, j] is the inner product of the differences of updates i and j to the global model, over
            all floating point parameters that they share.
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
        """(n, n) squared L2 distances between updates; 0 on the diagonal, and never below."""
        squares = self.products.diagonal()
        distances = (squares[:, None] + squares[None, :] - 2 * self.products).clamp(min=0)
        # Of what is too far away to be squared, infinity minus infinity.
        return distances.nan_to_num(nan=torch.inf).fill_diagonal_(0)


def block_products(differences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(n, n) inner products of a block of n updates' differences to the global model, each a flat float64 tensor.

    Returns: those of each chunk of it, to be added in their order.
    """
    return [chunk @ chunk.T for chunk in chunks(torch.stack(list(differences)))]
