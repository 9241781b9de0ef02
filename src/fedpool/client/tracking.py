"""`SummaryWriter` with the methods of `nvflare.client.tracking.SummaryWriter`: each scalar goes through `fedpool.client.log`."""

from typing import Any

from fedpool.client import log


class SummaryWriter:
    """Sends scalars to the round's metrics and the site's log instead of to event files."""

    def add_scalar(self, tag: str, scalar: Any, global_step: int | None = None, **where: Any) -> None:
        """Log one scalar under `tag`."""
        log(tag, scalar, **({} if global_step is None else {"global_step": global_step}), **where)

    def add_scalars(self, tag: str, scalars: dict[str, Any], global_step: int | None = None, **where: Any) -> None:
        """Log several scalars, each under `tag/name`."""
        for name, scalar in scalars.items():
            self.add_scalar(f"{tag}/{name}", scalar, global_step, **where)
