"""Turns at a site: a limited number of jobs trains at once, the others wait in order.

A turn is one round of one job, so jobs that share their sites make progress side by side. If a turn
were a whole job, two jobs could wait for each other at two sites for ever.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_S = 0.25


class Turns:
    """The turns of a site. Thread-safe.

    Args:
        limit: number of jobs that may have a turn at once; None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._waiting: list[tuple[str, object]] = []
        self._taken: list[str] = []
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, job_id: str, *, over: Callable[[], bool], tell: Callable[[str], None]) -> Iterator[bool]:
        """Have a turn during a `with` block.

        Args:
            over: whether the turn is no longer wanted; called regularly.
            tell: called once with the reason, if there is a wait.

        Returns: False if the turn was no longer wanted before it came.
        """
        came = self._wait(job_id, over, tell)
        try:
            yield came
        finally:
            if came:
                with self._changed:
                    self._taken.remove(job_id)
                    self._changed.notify_all()

    def _wait(self, job_id: str, over: Callable[[], bool], tell: Callable[[str], None]) -> bool:
        mine = (job_id, object())
        told = False
        with self._changed:
            self._waiting.append(mine)
        try:
            while True:
                with self._changed:
                    if self._is_next(mine):
                        self._taken.append(job_id)
                        return True
                    ahead = sorted({*self._taken, *(job for job, _ in self._waiting[: self._waiting.index(mine)])})
                if not told:
                    told = True
                    tell(
                        f"waiting for its turn: this site lets {self._limit} at a time train (max_jobs), and {', '.join(ahead)} "
                        "asked first"
                    )
                if over():
                    return False
                with self._changed:
                    if not self._is_next(mine):
                        self._changed.wait(_POLL_S)
        finally:
            with self._changed:
                self._waiting.remove(mine)
                self._changed.notify_all()

    def _is_next(self, mine: tuple[str, object]) -> bool:
        return self._limit is None or self._waiting.index(mine) < self._limit - len(self._taken)
