"""Failures of the user's own code: strategies, aggregators, filters."""

import asyncio
import traceback

from fedpool.as_imported import is_users

OWN_FAILURES = (Exception, SystemExit, asyncio.CancelledError)
"""What the user's code may raise. Unless it is caught, a `SystemExit` would end the coordinator,
and a `CancelledError` would look like someone's wish to cancel the job.
"""


def told(error: BaseException) -> str:
    """An error in one line, with the line of the user's code that it comes from, if any."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return f"{text} ({frame.filename}, line {frame.lineno})"
    return text
