"""A running job: the state its rounds share, and the signals between its loop and its rounds."""

import asyncio
from collections.abc import Mapping, Sequence

from fedpool.checked import CheckedTensors
from fedpool.flows.plan import Step
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.sites.sites import Sites
from fedpool.store import Store
from fedpool.tasks.aggregate import Before
from fedpool.tasks.answers import Asked
from fedpool.tasks.arithmetic import Arithmetic
from fedpool.tasks.collect import Round
from fedpool.tasks.committed import Committed
from fedpool.tasks.guarded import strategy_of
from fedpool.tasks.key_metric import MetricRules
from fedpool.tasks.ledger import Ledger
from fedpool.tasks.observer import Observer, Observers
from fedpool.tasks.record import RoundRecord
from fedpool.tasks.used import Counted
from fedpool.tasks.virtual_round import VirtualClock
from fedpool.tasks.virtual_time import Schedule, units_of
from fedpool.tensors import Digest, Tensors

LOOK_AHEAD = 2
"""Rounds started ahead: in Prefect, starting a round takes longer than a short round."""


class RoundSignals:
    """The signals between a job's loop and the run of a round.

    `step` tells the round what to do, `committed` tells the loop that it is done. `created` (the
    run exists or could not be created) tells the next round to create its own, because the server
    handles them one by one. `ended` (the run has ended) lets the next round start, so the UI shows
    one round after the other.
    """

    __slots__ = ("committed", "created", "ended", "step")

    def __init__(self) -> None:
        self.created = asyncio.Event()
        self.step: asyncio.Future[Step | None] = asyncio.get_running_loop().create_future()
        """None if the job ends before the round's turn."""
        self.committed = asyncio.Event()
        self.ended = asyncio.Event()


class Job:
    """A running job: the state that its rounds share, and what they have committed so far."""

    # Not a dataclass and without __dict__: Prefect walks the parameters of flows, and must not walk
    # this.
    __slots__ = (
        "clock",
        "committed",
        "counted",
        "late",
        "ledger",
        "look_ahead",
        "observer",
        "paths",
        "recipe",
        "resumed_at",
        "rounds",
        "rules",
        "sites",
        "store",
        "strategy",
    )

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        sites: Sites,
        ledger: Ledger,
        committed: Committed,
        look_ahead: int = LOOK_AHEAD,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.recipe = recipe
        self.paths = JobPaths(ledger.job.job_id)
        self.store = store
        self.sites = sites
        self.look_ahead = look_ahead
        self.rules = MetricRules.stored(ledger.job)
        """The rules about metrics from the job's start, also when it is resumed."""
        self.strategy = strategy_of(recipe, len(sites.names))
        self.ledger = ledger
        """The committed state; each commit replaces it."""
        self.resumed_at = ledger.number
        """The round where the job continues; an earlier coordinator may have done parts of it."""
        self.committed = committed
        """Opens its global models and states."""
        self.counted = Counted(recipe.aggregation_weights)
        units = units_of(ledger.job.environment)
        self.clock = None if units is None else VirtualClock(Schedule.after(units, ledger.records))
        """The clock of a simulation in virtual time."""
        self.late: set[tuple[int, str, int]] = set()
        """Rounds, sites and attempts of late updates that haven't arrived yet."""
        self.rounds: dict[int, RoundSignals] = {}
        self.observer: Observer = Observers(*observers)
        """Its observers, chosen by its environment."""

    @property
    def job_id(self) -> str:
        """Its folder in the store."""
        return self.ledger.job.job_id

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name

    @property
    def records(self) -> Sequence[RoundRecord]:
        """The records of all committed rounds."""
        return self.ledger.records

    @property
    def arithmetic(self) -> Arithmetic:
        """The version of its arithmetic."""
        return self.ledger.job.arithmetic

    @property
    def holes(self) -> frozenset[str] | None:
        """See `JobRecord.holes`."""
        return self.ledger.job.holes

    def round(self, number: int, asked: Mapping[str, Asked]) -> Round:
        """The state that the tasks of a round share.

        Args:
            asked: site -> how it was asked in that round before.
        """
        return Round(
            number,
            self.sites,
            self.store,
            retries=self.recipe.site_retries,
            patience_s=self.recipe.site_patience_s,
            asked=asked,
            observer=self.observer,
            clock=self.clock,
        )

    def global_model(self, number: int, head: Digest, *, submitted: bool = False) -> CheckedTensors:
        """The global model of a round, read in checked blocks.

        Args:
            head: its digest.
            submitted: whether it is a site's own model, which may have other dtypes.
        """
        spec = None if submitted else self.recipe.model.spec
        return self.committed.tensors(self.paths.global_model(number), head, spec)

    def before(self, number: int, base: Tensors) -> Before:
        """The state that a training round starts from."""
        state = self.ledger.state
        self.counted.follow(self.records)
        return Before(
            base,
            self.committed.tensors(self.paths.state(number - 1), state) if state else None,
            number,
            holes=self.holes or frozenset(),
            weights=dict(self.counted.first_weights),
        )
