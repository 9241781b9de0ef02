"""A logger for Lightning's trainers that sends what they log, as `flare.log` does:
`Trainer(logger=flare.logger())`.
"""

import importlib
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import fedpool.client
from fedpool.client.compat import AnalyticsDataType

_LIGHTNING = "lightning.pytorch"


def logger(prefix: str = "") -> Any:
    """A logger for the trainer of the package that the script has imported, `pytorch_lightning` or
    `lightning.pytorch`.

    Rank 0 sends. Numbers show in the site's log and, with their last value, in the round's record;
    hyperparameters in the log.

    Args:
        prefix: is put before each name, with a dash.
    """
    package = (
        _LIGHTNING if _LIGHTNING in sys.modules and "pytorch_lightning" not in sys.modules else "pytorch_lightning"
    )
    base = importlib.import_module(f"{package}.loggers").Logger
    return type("FedpoolLogger", (_Logger, base), {})(prefix)


class _Logger:
    """What both packages' loggers have in common; mixed into the `Logger` of one of them."""

    name = "fedpool"
    version = ""

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix}-" if prefix else ""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send numbers."""
        named = {f"{self._prefix}{name}": value for name, value in metrics.items()}
        fedpool.client.log("metrics", named, AnalyticsDataType.METRICS, global_step=step)

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write the module's hyperparameters to the site's log."""
        values = vars(params) if isinstance(params, Namespace) else params
        fedpool.client.log("hyperparameters", dict(values), AnalyticsDataType.PARAMETERS)
