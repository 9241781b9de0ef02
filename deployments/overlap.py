"""Runs of a deployment that would overlap: the choices, and what each means to Prefect."""

from typing import TYPE_CHECKING, Literal, get_args

from fedpool.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import ConcurrencyOptions

Overlap = Literal["skip", "queue", "cancel"]

_MEANINGS: dict[Overlap, str] = {
    "skip": "A run that is due while another one is under way is skipped.",
    "queue": "A run that is due while another one is under way waits for its end.",
    "cancel": "A run that is due while another one is under way cancels that one, and begins when it has ended.",
}


def chosen(overlap: str | None, *, scheduled: bool) -> Overlap | None:
    """What was asked for, or what it is by default: a schedule skips, runs that people start do not
    hinder each other.

    Raises:
        ConfigError: there is no such choice.
    """
    if overlap is None:
        return "skip" if scheduled else None
    if overlap not in get_args(Overlap):
        raise ConfigError(f"overlap={overlap!r} is not known: use {', '.join(map(repr, get_args(Overlap)))}")
    return overlap  # type: ignore[return-value]  # one of them, as was just seen


def described(overlap: Overlap | None) -> str:
    """A sentence for the deployment's description."""
    return "Its runs may overlap." if overlap is None else _MEANINGS[overlap]


def limit(overlap: Overlap | None) -> "tuple[int | None, ConcurrencyOptions | None]":
    """The deployment's concurrency limit, and what Prefect does with the runs beyond it; for
    "cancel" see `flows.overlap`.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions

    strategies = {"skip": ConcurrencyLimitStrategy.CANCEL_NEW, "queue": ConcurrencyLimitStrategy.ENQUEUE}
    if overlap not in strategies:
        return None, None
    return 1, ConcurrencyOptions(collision_strategy=strategies[overlap])
