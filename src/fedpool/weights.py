"""`aggregation_weights`: the user's factors on the weights of sites' updates."""

from collections.abc import Mapping

from fedpool.errors import RecipeError
from fedpool.paths import check_name


def check_weights(weights: Mapping[str, float]) -> Mapping[str, float]:
    """Return the weights if they are valid.

    Raises:
        RecipeError: a weight is negative or not finite, or all are 0.
    """
    for site, weight in weights.items():
        check_name("site", site)
        if not 0 <= weight < float("inf"):
            raise RecipeError(f"aggregation_weights[{site!r}] must be a finite number from 0, got {weight}")
    if weights and not any(weights.values()):
        raise RecipeError("aggregation_weights are all 0: no update would count")
    return weights
