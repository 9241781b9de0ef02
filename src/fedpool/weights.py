"""`aggregation_weights`: what the user multiplies the weights of sites' updates by."""

from collections.abc import Mapping

from fedpool.errors import RecipeError
from fedpool.paths import check_name


def check_weights(weights: Mapping[str, float]) -> Mapping[str, float]:
    """Return the weights if they can be used.

    Raises:
        RecipeError: one is negative or not finite, or all are 0.
    """
    for site, weight in weights.items():
        check_name("site", site)
        if not 0 <= weight < float("inf"):
            raise RecipeError(f"aggregation_weights[{site!r}] must be a finite number from 0, got {weight}")
    if weights and not any(weights.values()):
        raise RecipeError("aggregation_weights are all 0: no update would count")
    return weights
