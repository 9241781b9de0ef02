"""How a site polls the store: for its assignment, and for the end of its job or of a round."""

import threading
import time
from collections.abc import Callable

from pydantic import ValidationError

from fedpool.errors import IntegrityError, SiteError, StoreError, StoreRefused
from fedpool.messages import SiteAssignment
from fedpool.paths import JobPaths
from fedpool.store import Store

_LOCAL_POLL_S = 0.05
_REMOTE_POLL_S = 0.25
_MAX_BYTES = 1 << 20
"""Limit on an assignment in the store."""
_JOB_POLL_S = 1.0
"""Interval at which a site checks whether its job has ended, while it waits or trains."""


class Either:
    """An event that is set when either of two events is."""

    def __init__(self, first: threading.Event, second: threading.Event) -> None:
        self._events = (first, second)

    def is_set(self) -> bool:
        """Whether at least one of them is set."""
        return any(event.is_set() for event in self._events)


class Looks:
    """A job as its site sees it in the store.

    Args:
        site: the site's name.
        max_wait_s: how long to wait for a round to begin.
    """

    def __init__(self, site: str, store: Store, paths: JobPaths, *, max_wait_s: float) -> None:
        self._site = site
        self._store = store
        self._paths = paths
        self._max_wait_s = max_wait_s

    def has_ended(self) -> bool:
        """Whether the job's result is in the store."""
        return self._is_there(self._paths.result)

    def is_over(self, round: int) -> bool:
        """Whether the job has ended, or has committed the round."""
        return self.has_ended() or self._is_there(self._paths.record(round))

    def _is_there(self, path: str) -> bool:
        try:
            return self._store.exists(path)
        except (OSError, StoreError):  # without an answer, assume that it is not there
            return False

    def wait_for(self, round: int, attempt: int, stop: Either) -> SiteAssignment | None:
        """Wait for the assignment; None if the round or the job ends before it is written.

        Args:
            stop: ends the wait when set; checked regularly.

        Raises:
            SiteError: the wait was stopped, or the round did not begin in time.
            IntegrityError: the object is not an assignment.
            OSError, StoreError: the store has not answered for too long, or refuses.
        """
        path = self._paths.assignment(round, self._site, attempt)
        pause = threading.Event()
        began = looked = answered = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                if self._store.exists(path):
                    return SiteAssignment.model_validate_json(self._store.read_bytes(path, _MAX_BYTES))
                answered = now
            except StoreRefused:
                raise
            except (OSError, StoreError):  # no answer: wait as long as a write would
                if now - answered > self._store.patience_s:
                    raise
            except ValidationError as error:
                raise IntegrityError(f"{self._store.full(path)} is not an assignment: {error}") from None
            if now - looked >= _JOB_POLL_S:
                looked = now
                if self.is_over(round):
                    return None
            if stop.is_set():
                raise SiteError(self._site, round, "the run was cancelled before the round began")
            if now - began > self._max_wait_s:
                raise SiteError(
                    self._site,
                    round,
                    f"the round did not begin within {self._max_wait_s:g} s (max_wait_s): the coordinator is gone",
                )
            pause.wait(_LOCAL_POLL_S if self._store.is_local else _REMOTE_POLL_S)


class NowAndThen:
    """A question to the store, asked at most once per second; in between the answer is False."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self._asked < _JOB_POLL_S:
            return False
        self._asked = time.monotonic()
        return self._ask()


class Watch:
    """Polls `condition` during a `with` block, and calls `act` once when it holds."""

    def __init__(self, condition: Callable[[], bool], act: Callable[[], None]) -> None:
        self.fired = False
        self._condition = condition
        self._act = act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fedpool-watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_JOB_POLL_S):
            if self._condition():
                self.fired = True
                self._act()
                return
