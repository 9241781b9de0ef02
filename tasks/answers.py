"""What a round asks of its sites, their outcomes so far, and when to ask a site again."""

import asyncio
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from fedpool.messages import Task, Used
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Late, Outcome, Probed
from fedpool.tasks.quorum import Quorum
from fedpool.tensors import Digest

_OF_A_SITE = re.compile(
    r"(attempts/(?P<attempt>[1-9]\d*)/)?(sites/(?P<site>[^/]+)/(?P<object>[^/]+)|assignments/(?P<asked>[^/]+)\.json)"
)


class Turn:
    """The details of a round, known once its turn has come: the task, and how to judge updates."""

    __slots__ = ("base", "deadline", "expected", "probes", "quorum", "sites", "state", "task", "used")

    def __init__(
        self,
        task: Task,
        base: Digest,
        expected: Expected,
        *,
        state: Digest | None,
        deadline: float | None,
        quorum: Quorum,
        sites: Collection[str],
        probes: Collection[str],
        used: Mapping[str, Used] | None = None,
    ) -> None:
        self.task = task
        self.base = base
        self.expected = expected
        self.state = state
        """The strategy's state, if sites need to see it."""
        self.deadline = deadline
        self.quorum = quorum
        self.sites = frozenset(sites)
        self.probes = frozenset(probes)
        """The sites in quarantine: their updates are judged but not used."""
        self.used = used or {}
        """site -> its last update that counted, if the strategy shows it to sites."""


class Answers:
    """The outcomes of a round so far. `closed` is set once the round stops waiting."""

    __slots__ = ("_accepted_s", "_began", "_closing", "_probes", "_quorum", "closed", "outcomes")

    def __init__(self, began: float, quorum: Quorum, probes: Collection[str]) -> None:
        self.outcomes: list[Outcome] = []
        self.closed = asyncio.Event()
        self._began = began
        self._quorum = quorum
        self._probes = probes
        self._accepted_s: list[float] = []
        self._closing: asyncio.TimerHandle | None = None

    def add(self, outcome: Outcome) -> None:
        """Note an outcome. An update that arrives after the round has closed is late."""
        if isinstance(outcome, Accepted) and outcome.site in self._probes:
            outcome = Probed(outcome)
        elif isinstance(outcome, Accepted):
            if self.closed.is_set():
                outcome = Late(outcome.site, outcome.attempt)
            else:
                self._note_accepted()
        self.outcomes.append(outcome)

    def end(self) -> None:
        """Cancel the scheduled close of the round."""
        if self._closing is not None:
            self._closing.cancel()

    def _note_accepted(self) -> None:
        now_s = time.monotonic() - self._began
        self._accepted_s.append(now_s)
        closes_s = self._quorum.closes_after(self._accepted_s)
        if closes_s is not None and closes_s <= now_s:
            self.closed.set()
        elif closes_s is not None and self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(closes_s - now_s, self.closed.set)


@dataclass(frozen=True, slots=True)
class Asked:
    """How to continue with a site in a round that was begun before.

    Attributes:
        attempt: the attempt to ask the site in.
        answered: whether the manifest of its update is already in the store.
    """

    attempt: int
    answered: bool


def asked_before(found: Iterable[str], *, lives_on: bool) -> dict[str, Asked]:
    """site -> how to continue with it, in a round that an earlier coordinator has begun.

    Args:
        found: paths of the objects in the round's folder, relative to it.
        lives_on: whether sites that were asked may still be working although the coordinator was
            lost.
    """
    attempts: dict[str, int] = {}
    answered: set[tuple[str, int]] = set()
    for path in found:
        if match := _OF_A_SITE.fullmatch(path):
            site, attempt = match["site"] or match["asked"], int(match["attempt"] or 0)
            attempts[site] = max(attempt, attempts.get(site, 0))
            if match["object"] == "update.json":
                answered.add((site, attempt))
    return {
        site: Asked(attempt, True)
        if (site, attempt) in answered
        else Asked(attempt if lives_on else attempt + 1, False)
        for site, attempt in attempts.items()
    }


class Again:
    """When to ask a lost site again: the first `retries` times at once, then after growing pauses.

    The pauses end `patience_s` after its first loss. A worker that is being restarted may lose its
    work more than once.
    """

    def __init__(self, retries: int, patience_s: float) -> None:
        self._retries = retries
        self._patience_s = patience_s
        self._first_loss: float | None = None
        self._pause_s = 1.0

    def after_loss(self, now: float) -> float | None:
        """Seconds to wait before asking the site again; None: don't.

        Args:
            now: `time.monotonic()`.
        """
        first = self._first_loss = now if self._first_loss is None else self._first_loss
        if self._retries > 0:
            self._retries -= 1
            return 0.0
        pause_s, self._pause_s = self._pause_s, 2 * self._pause_s
        return pause_s if now + pause_s - first < self._patience_s else None
