"""The writers of `nvflare.client.tracking`, all of which write to `fedpool.client.log`.

A script doesn't have to know who tracks its job. Numbers reach the environment's trackers
(`track`), with step and time; they also appear in the site's log, and their last values in the
round's record. Parameters, tags and text appear in the site's log.
"""

from collections.abc import Mapping
from typing import Any

from fedpool.client import log
from fedpool.client.compat import AnalyticsDataType

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]


class SummaryWriter:
    """Takes scalars like TensorBoard's writer.

    Args:
        ctx: the value that `flare.init()` returned; None for this process's client.
    """

    def __init__(self, ctx: Any = None) -> None:
        self._ctx = ctx

    def add_scalar(self, tag: str, scalar: Any, global_step: int | None = None, **where: Any) -> None:
        """Log one scalar under `tag`."""
        log(tag, scalar, ctx=self._ctx, global_step=global_step, **where)

    def add_scalars(self, tag: str, scalars: Mapping[str, Any], global_step: int | None = None, **where: Any) -> None:
        """Log several scalars, each under `tag/name`."""
        log(tag, scalars, AnalyticsDataType.SCALARS, ctx=self._ctx, global_step=global_step, **where)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None, **where: Any) -> None:
        """Write a text to the site's log, under `tag`."""
        log(tag, text_string, AnalyticsDataType.TEXT, ctx=self._ctx)

    def flush(self) -> None:
        """Do nothing: nothing is buffered here."""

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class WandBWriter:
    """Takes metrics like `wandb`.

    Args:
        ctx: the value that `flare.init()` returned; None for this process's client.
    """

    def __init__(self, ctx: Any = None) -> None:
        self._ctx = ctx

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several metrics."""
        log("metrics", metrics, AnalyticsDataType.METRICS, ctx=self._ctx, global_step=step)


class MLflowWriter:
    """Takes metrics, parameters, tags and texts like `mlflow`.

    Args:
        ctx: the value that `flare.init()` returned; None for this process's client.
    """

    def __init__(self, ctx: Any = None) -> None:
        self._ctx = ctx

    def log_metric(self, key: str, value: Any, step: int | None = None) -> None:
        """Log one metric."""
        log(key, value, AnalyticsDataType.METRIC, ctx=self._ctx, global_step=step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several metrics."""
        log("metrics", metrics, AnalyticsDataType.METRICS, ctx=self._ctx, global_step=step)

    def log_param(self, key: str, value: Any) -> None:
        """Write a parameter to the site's log."""
        log(key, value, AnalyticsDataType.PARAMETER, ctx=self._ctx)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Write parameters to the site's log."""
        log("params", values, AnalyticsDataType.PARAMETERS, ctx=self._ctx)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Write a text to the site's log, under its file name."""
        log(artifact_file_path, text, AnalyticsDataType.TEXT, ctx=self._ctx)

    def set_tag(self, key: str, tag: Any) -> None:
        """Write a tag to the site's log."""
        log(key, tag, AnalyticsDataType.TAG, ctx=self._ctx)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Write tags to the site's log."""
        log("tags", tags, AnalyticsDataType.TAGS, ctx=self._ctx)
