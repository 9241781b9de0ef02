"""Schedules of deployments, parsed into Prefect's."""

from datetime import timedelta
from typing import TYPE_CHECKING

from fedpool.errors import ConfigError

if TYPE_CHECKING:
    from prefect.schedules import Schedule


def parse_schedule(entry: str | timedelta) -> "Schedule":
    """Parse a schedule.

    Raises:
        ConfigError: the text is neither a cron line nor a recurrence rule, or the interval is not
            positive.
    """
    from prefect.schedules import Cron, Interval, RRule

    try:
        if isinstance(entry, timedelta):
            if entry <= timedelta(0):
                raise ValueError("an interval must be positive")
            return Interval(entry)
        return RRule(entry) if "FREQ=" in entry else Cron(entry)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f'schedule {entry!r} is invalid ({error}): write a cron line "0 2 * * 0", a rule "FREQ=WEEKLY", or a timedelta'
        ) from None
