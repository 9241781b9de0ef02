"""Cyclic weight transfer: the model goes from site to site, and each site trains it in turn.

A round is one site's turn: the next global model is the model that the site sends.

Paper:
    Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging",
    JAMIA 25(8) (https://doi.org/10.1093/jamia/ocy017)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from fedpool.errors import RecipeError
from fedpool.flows.late_updates import NoLateUpdates
from fedpool.site_order import in_order
from fedpool.tasks.mean import weighted_mean
from fedpool.tasks.strategy import State, Strategy, Update, relative_weights


@dataclass(frozen=True)
class Cyclic(Strategy):
    """w <- w_k of the site whose turn it is"""

    order: str | tuple[str, ...]

    def choose(self, *, seed: int, round: int, sites: Sequence[str], count: int | None) -> tuple[str, ...]:
        """See `Strategy.choose`: the next site in the order that still takes part."""
        turns = [site for site in self.order if site in sites] if isinstance(self.order, tuple) else list(sites)
        cycle, position = divmod(round, len(turns) or 1)
        if self.order == "random":
            # A string seeds the generator through sha512, so the draw is the same on every machine
            # and for every hash seed.
            turns = random.Random(f"cyclic/{seed}/{cycle}").sample(sorted(sites), len(sites))
        return (turns[position],) if turns else ()

    def apply(self, state: State, updates: Sequence[Update]) -> State:
        weights = relative_weights(updates)
        params = {
            name: weighted_mean(zip(weights, (update.params[name] for update in updates), strict=True))
            for name in state.params
        }
        return state.after(params)


class CyclicRecipe(NoLateUpdates):
    """Weight transfer from site to site, without averaging, for few sites with little data each.

    A round is one site's turn: with `num_rounds=30`, the model visits each of 10 sites three times.

    Client script: examples/algorithms/plain.py
        The same script as for federated averaging.
    """

    min_clients: int = Field(
        default=1,
        description="accepted updates that a round needs: always 1, from the site whose turn it is",
        ge=1,
        le=1,
    )
    order: str | tuple[str, ...] = Field(
        default="fixed",
        description="fixed: by name, site-2 before site-10; random: drawn for each cycle from the seed; or a list of sites",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if isinstance(self.order, str) and self.order not in ("fixed", "random"):
            raise RecipeError(f"order={self.order!r} is unknown: use 'fixed', 'random', or a list of sites")
        if not self.order:
            raise RecipeError("order=[] names no sites: list them, or use 'fixed' or 'random'")
        if self.clients_per_round is not None:
            raise RecipeError(
                f"clients_per_round={self.clients_per_round}: each round of cyclic weight transfer has one site: leave it out"
            )
        return self

    def check_sites(self, sites: Sequence[str]) -> None:
        super().check_sites(sites)
        if isinstance(self.order, tuple) and (unknown := in_order(set(self.order) - set(sites))):
            raise RecipeError(f"order names {', '.join(unknown)}, but the sites are {', '.join(in_order(sites)[:8])}")

    def strategy(self, num_sites: int) -> Cyclic:
        return Cyclic(self.order)
