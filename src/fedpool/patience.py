"""How long, and how often, an operation is retried."""

import time
from collections.abc import Callable, Iterator


def pauses(
    limit_s: float, pause_s: float, longest_s: float | None = None, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[float]:
    """Pauses between tries, for a loop that sleeps in its own way, with or without asyncio.

    There is at least one try, and one at the limit or just after it. Code after the loop handles
    failure.

        for pause_s in pauses(60, 0.2):
            if is_there():
                return
            time.sleep(pause_s)
        raise ServerError("it did not come up in 60 s")

    Args:
        limit_s: seconds from the first try to the last one.
        pause_s: seconds from one try to the next.
        longest_s: pauses double up to this length; None: all have the same length.
        clock: measures the seconds.

    Yields: seconds to pause; 0 after the last try.
    """
    deadline = clock() + limit_s
    while (left_s := deadline - clock()) > 0:
        yield min(pause_s, left_s)
        if longest_s is not None:
            pause_s = min(2 * pause_s, longest_s)
    yield 0.0
