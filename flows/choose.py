"""Which sites a round asks, and how many it waits for: functions of the committed state."""

from collections.abc import Collection, Sequence

from fedpool.flows.plan import Step
from fedpool.messages import Task
from fedpool.recipe import Recipe
from fedpool.site_order import in_order
from fedpool.tasks.guarded import check_chosen, running
from fedpool.tasks.ledger import Ledger
from fedpool.tasks.quarantine import quarantined
from fedpool.tasks.quorum import Quorum
from fedpool.tasks.sampling import choose_sites
from fedpool.tasks.strategy import Strategy


def choose(
    recipe: Recipe,
    strategy: Strategy,
    ledger: Ledger,
    names: Sequence[str],
    number: int,
    *,
    everyone: bool,
    task: Task = "train",
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The sites of a round, and those of them that are in quarantine.

    Args:
        names: of all sites.
        everyone: whether to ask all sites, whatever the recipe says about sampling.
    """
    probes = quarantined(ledger.records, recipe.max_rejections)
    draw = strategy.choose if task == "train" and not everyone else choose_sites
    size = None if everyone else recipe.sample_size
    there = ledger.job.arithmetic.ordered(set(names) - probes)
    with running(strategy, "choose"):
        chosen = draw(seed=recipe.seed, round=number, sites=there, count=size)
    check_chosen(strategy, chosen, there)
    return tuple(in_order((*chosen, *probes))), probes


def quorum_of(recipe: Recipe, step: Step, sites: Collection[str], num_there: int = 0) -> Quorum:
    """The rule that closes a round.

    Args:
        sites: those that are asked.
        num_there: number of updates that the round already has.
    """
    if step.everyone:
        return Quorum(len(sites))
    take = recipe.clients_per_round - num_there if recipe.clients_per_round and recipe.over_sample else None
    return Quorum(max(1, recipe.min_clients - num_there), recipe.quorum_grace, take)
