"""What to do with runs of a deployment that would overlap, and how Prefect expresses it."""

from typing import TYPE_CHECKING, Literal, get_args

from fedpool.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import ConcurrencyOptions

Overlap = Literal["skip", "queue", "cancel"]

_MEANINGS: dict[Overlap, str] = {
    "skip": "A run that is due while another one is in progress is skipped.",
    "queue": "A run that is due while another one is in progress waits for its end.",
    "cancel": "A run that is due while another one is in progress cancels it, and begins once it has ended.",
}


def chosen(overlap: str | None, *, scheduled: bool) -> Overlap | None:
    """The choice, or its default: scheduled runs are skipped, other runs may overlap.

    Raises:
        ConfigError: the choice is not known.
    """
    if overlap is None:
        return "skip" if scheduled else None
    if overlap not in get_args(Overlap):
        raise ConfigError(f"overlap={overlap!r} is not known: use {', '.join(map(repr, get_args(Overlap)))}")
    return overlap  # type: ignore[return-value]  # checked above


def described(overlap: Overlap | None) -> str:
    """A sentence for the deployment's description."""
    return "Its runs may overlap." if overlap is None else _MEANINGS[overlap]


def limit(overlap: Overlap | None) -> "tuple[int | None, ConcurrencyOptions | None]":
    """The deployment's concurrency limit and strategy; for "cancel" see `flows.overlap`."""
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions

    strategies = {"skip": ConcurrencyLimitStrategy.CANCEL_NEW, "queue": ConcurrencyLimitStrategy.ENQUEUE}
    if overlap not in strategies:
        return None, None
    return 1, ConcurrencyOptions(collision_strategy=strategies[overlap])
