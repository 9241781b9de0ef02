"""Cross-site evaluation without training: every site scores every site's best local model.

`model` is the server's model, and scored as well. A training recipe does the same after its
training with `cross_site_eval=True`.
"""

from typing import ClassVar, Literal

from pydantic import Field

from fedpool.flows.evaluation import EvaluationRecipe


class CrossSiteEvalRecipe(EvaluationRecipe):
    """Score the server's model and each site's own model at every site.

    `min_clients` counts the sites that score the server's model. A site's model that is missing
    leaves gaps in the matrix.

    Client script: examples/cross-site/client.py
        It sends metrics for the model that it receives, and its best local model when asked for it.

            if flare.is_evaluate():
                meta = {"NUM_EVAL_EXAMPLES": int((~rows).sum())}
                flare.send(flare.FLModel(metrics={"accuracy": score}, meta=meta))
            elif flare.is_submit_model():
                flare.send(flare.FLModel(params=best_params))

    Raises:
        RecipeError (also a pydantic.ValidationError): a field is invalid; says which, its value and
            the remedy.
    """

    cross_site_eval: ClassVar[Literal[True]] = True

    keep_updates: Literal["all", "last", "none"] = Field(
        default="all",
        description="rounds whose updates stay in the store afterwards: all, only the last, or none; hashes always stay",
    )
