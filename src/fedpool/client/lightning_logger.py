"""A logger for Lightning's trainers that sends values like `flare.log`:
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
    """A logger for trainers of the package that the script imports: `pytorch_lightning` or
    `lightning.pytorch`.

    Rank 0 sends. Numbers appear in the site's log, and their last values in the round's record.
    Hyperparameters appear only in the log.

    Args:
        prefix: put before each name, with a dash.
    """
    package = (
        _LIGHTNING if _LIGHTNING in sys.modules and "pytorch_lightning" not in sys.modules else "pytorch_lightning"
    )
    base = importlib.import_module(f"{package}.loggers").Logger
    return type("FedpoolLogger", (_Logger, base), {})(prefix)


class _Logger:
    """The common part of both packages' loggers; mixed into the `Logger` of one of them."""

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
