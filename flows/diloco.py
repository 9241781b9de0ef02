"""DiLoCo: many local steps at the sites, and a step of outer Nesterov momentum at the server.

delta is the mean of the sites' differences to w. The outer optimizer takes -delta as its gradient:

    m <- outer_momentum m + delta; w <- w + outer_lr (delta + outer_momentum m)

Paper:
    Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models",
    algorithm 1 (https://arxiv.org/abs/2311.08105)
"""

from pydantic import Field

from fedpool.flows.averaging import AveragingRecipe
from fedpool.flows.fedopt import FedOpt
from fedpool.tasks.optimizers import Momentum, Schedule


class DiLoCoRecipe(AveragingRecipe):
    """Distributed low-communication training: hundreds of local AdamW steps, outer Nesterov
    momentum.

    For language models over slow links: a round transfers the model once, however many steps it
    takes.

    Client script: examples/algorithms/plain.py
        The same script as for federated averaging. The inner optimizer is the script's own; in the
        paper it is AdamW, for 500 steps. Create it once, before the loop, so its state lasts from
        round to round.
    """

    outer_lr: float = Field(default=0.7, description="learning rate of the outer optimizer", gt=0, allow_inf_nan=False)
    outer_momentum: float = Field(default=0.9, description="Nesterov momentum of the outer optimizer", ge=0, lt=1)

    def strategy(self, num_sites: int) -> FedOpt:
        return FedOpt(self.rule, Momentum(Schedule(self.outer_lr), self.outer_momentum, nesterov=True))
