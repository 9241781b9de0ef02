"""The mathematics of robust aggregation: pure functions on tensors, each with its paper.

Legend: n updates, f of which may be arbitrary ("Byzantine"); `values` is (n, elements),
`squared_distances` is (n, n).
"""

import math

import torch

_WEISZFELD_STEPS = 500
_WEISZFELD_TOLERANCE = 1e-11
_SMOOTHING = 1e-9
_SMALLEST = 1e-300


def median(values: torch.Tensor) -> torch.Tensor:
    """Coordinate-wise median; for an even number of values, the mean of the middle two.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    algorithm 1, option I (https://arxiv.org/abs/1803.01498).
    """
    ordered = values.sort(dim=0).values
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low + (high - low) / 2  # their sum could overflow


def num_trimmed(n: int, ratio: float) -> int:
    """Number of values, of n, that a trimmed mean drops at each end: floor(ratio * n)."""
    return math.floor(ratio * n + 1e-9)  # .29 * 100 is 28.999999999999996


def trimmed_mean(values: torch.Tensor, num_dropped: int) -> torch.Tensor:
    """Coordinate-wise mean without the `num_dropped` lowest and the `num_dropped` highest values.

    Yin et al. 2018, algorithm 1, option II (https://arxiv.org/abs/1803.01498).
    """
    ordered = values.sort(dim=0).values
    return _mean(ordered[num_dropped : len(ordered) - num_dropped])


def krum_scores(squared_distances: torch.Tensor, num_byzantine: int) -> torch.Tensor:
    """(n,) sum of each update's squared distances to its n - f - 2 nearest others (at least one).

    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    section 4 (https://arxiv.org/abs/1703.02757).
    """
    n = len(squared_distances)
    num_near = max(1, n - num_byzantine - 2)
    nearest = squared_distances.sort(dim=1).values[:, 1 : 1 + num_near]  # each update's nearest is itself
    # Added in order: the order of torch's own sum depends on the processor.
    return nearest.cumsum(dim=1)[:, -1]


def multi_krum(squared_distances: torch.Tensor, num_byzantine: int, num_selected: int) -> list[int]:
    """Indices of the `num_selected` updates with the lowest scores, ascending. The first wins ties.

    With `num_selected=1`, this is Krum.
    """
    order = krum_scores(squared_distances, num_byzantine).argsort(stable=True)
    return sorted(order[:num_selected].tolist())


def bulyan_selection(squared_distances: torch.Tensor, num_byzantine: int) -> list[int]:
    """Indices of the n - 2f updates that Krum picks one by one, ascending.

    El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", section
    4 (https://arxiv.org/abs/1802.07927).
    """
    left = list(range(len(squared_distances)))
    selected = []
    for _ in range(len(squared_distances) - 2 * num_byzantine):
        (best,) = multi_krum(squared_distances[left][:, left], num_byzantine, 1)
        selected.append(left.pop(best))
    return sorted(selected)


def mean_around_median(values: torch.Tensor, num_near: int, *, midpoint: bool) -> torch.Tensor:
    """Bulyan's second step: coordinate-wise mean of the `num_near` values nearest to the median.

    The first values win ties.

    Args:
        midpoint: whether the median of an even number of values is the mean of the middle two; if
            not, it is the lower one.
    """
    middle = median(values) if midpoint else values.sort(dim=0).values[(len(values) - 1) // 2]
    near = (values - middle).abs().argsort(dim=0, stable=True)[:num_near]
    return _mean(values.gather(0, near.sort(dim=0).values))


def geometric_median_weights(products: torch.Tensor, weights: torch.Tensor | None = None) -> list[float]:
    """(n,) weights, summing to 1, whose weighted mean of the updates is their geometric median.

    The smoothed Weiszfeld algorithm of Pillutla et al. 2019, "Robust Aggregation for Federated
    Learning", algorithm 2 (https://arxiv.org/abs/1912.13445), computed from the inner products of
    the updates alone. The weights are rounded to ten digits, because the last bits of the products
    depend on the processor.

    Args:
        products: (n, n) inner products of the updates' differences to any common point.
        weights: (n,) of the updates, above 0; None: all equal.
    """
    squares = products.diagonal()
    finite = squares.isfinite()
    products = torch.where(finite[:, None] & finite[None, :], products, 0.0)
    squares = products.diagonal()
    given = torch.where(finite, torch.ones_like(squares) if weights is None else weights / weights.max(), 0.0)
    weights = given / given.sum().clamp(min=_SMALLEST)
    for _ in range(_WEISZFELD_STEPS):
        shared = products @ weights
        distances = (squares - 2 * shared + weights @ shared).clamp(min=0).sqrt()
        # Relative to the median distance, because an attacker controls how large the largest one
        # is.
        smallest = max(_SMOOTHING * float(distances[finite].median()), _SMALLEST) if finite.any() else 1.0
        nearness = given / distances.clamp(min=smallest)
        following = nearness / nearness.sum()
        # A relative change, because the farthest update may have the smallest weight.
        moved = float(((following - weights).abs() / following.clamp(min=_SMALLEST)).max())
        weights = following
        if moved < _WEISZFELD_TOLERANCE:
            break
    return [float(f"{weight:.9e}") for weight in weights.tolist()]


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Running mean over dimension 0: equal values give exactly that value; no sum overflows."""
    mean = values[0].clone()
    for count, value in enumerate(values[1:], start=2):
        mean.lerp_(value, 1 / count)
    return mean
