"""FedBN: federated averaging in which batch normalisation stays at the site.

The server does federated averaging. Each site finds its own batch normalisation in the model that
it receives.

Paper:
    Li et al. 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
    algorithm 1 (https://arxiv.org/abs/2102.07623)
"""

import re
from typing import Self

from pydantic import model_validator

from fedpool.errors import RecipeError
from fedpool.exclude import check_excluded
from fedpool.flows.fedavg import FedAvgRecipe

_STATISTIC = "running_mean"


class FedBNRecipe(FedAvgRecipe):
    """Federated averaging for sites whose inputs look different, for example from other scanners.

    Each site keeps its own batch normalisation: the recipe adds every layer with running statistics
    to `exclude_vars`, with its scale and shift.

    Client script: examples/algorithms/plain.py
        The same script as for federated averaging.
    """

    @model_validator(mode="after")
    def _exclude_normalisation(self) -> Self:
        names = list(self.model.spec)
        layers = sorted(name.removesuffix(_STATISTIC) for name in names if name.split(".")[-1] == _STATISTIC)
        if not layers:
            raise RecipeError(
                f"FedBN needs batch normalisation, but no parameter is named {_STATISTIC}: {', '.join(sorted(names)[:8])}"
            )
        patterns = tuple(f"^{re.escape(layer)}[^.]*$" for layer in layers)
        missing = tuple(pattern for pattern in patterns if pattern not in self.exclude_vars)
        if missing:
            object.__setattr__(self, "exclude_vars", self.exclude_vars + missing)
            check_excluded(self.exclude_vars, self.model.spec)
        return self
