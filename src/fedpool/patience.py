"""How long, and how often, something is tried again."""

import time
from collections.abc import Callable, Iterator


def pauses(
    limit_s: float, pause_s: float, longest_s: float | None = None, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[float]:
    """The pauses after tries, for a loop that tries, and then sleeps in its own way, with or
    without asyncio.

    The loop has at least one try, and one at the limit or just after it. What follows the loop is
    for when all were in vain.

        for pause_s in pauses(60, 0.2):
            if is_there():
                return
            time.sleep(pause_s)
        raise ServerError("it did not come up in 60 s")

    Args:
        limit_s: seconds from the first try to the last one.
        pause_s: seconds from one try to the next.
        longest_s: the pauses double until they are that long; None: all are alike.
        clock: what seconds are counted by.

    Yields: seconds to pause; 0 after the last try.
    """
    deadline = clock() + limit_s
    while (left_s := deadline - clock()) > 0:
        yield min(pause_s, left_s)
        if longest_s is not None:
            pause_s = min(2 * pause_s, longest_s)
    yield 0.0
