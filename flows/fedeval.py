"""Federated evaluation: every site scores one model on its own data, in one round, without
training.

The result has each site's metrics with its weight, and the pooled metrics with their denominators.
Pooled metrics are means weighted by `NUM_EVAL_EXAMPLES`, the number of rows that a site has scored;
without it, by `NUM_STEPS_CURRENT_ROUND`.
"""

from typing import ClassVar, Literal

from fedpool.flows.evaluation import EvaluationRecipe


class FedEvalRecipe(EvaluationRecipe):
    """Score a model, or a checkpoint, at every site.

    Client script: examples/cross-site/client.py
        It sends metrics and no params.

            if flare.is_evaluate():
                meta = {"NUM_EVAL_EXAMPLES": int((~rows).sum())}
                flare.send(flare.FLModel(metrics={"accuracy": score}, meta=meta))

    Raises:
        RecipeError (also a pydantic.ValidationError): a field is invalid; says which, its value and
            the remedy.
    """

    cross_site_eval: ClassVar[Literal[False]] = False
    keep_updates: ClassVar[Literal["all"]] = "all"
