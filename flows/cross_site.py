"""Cross-site evaluation without training: sites submit their best local models, and every site
scores every model.

`model` is the server's. A training recipe does the same after its training, with
`cross_site_eval=True`.
"""

from typing import ClassVar, Literal

from pydantic import Field

from fedpool.flows.evaluation import EvaluationRecipe


class CrossSiteEvalRecipe(EvaluationRecipe):
    """Score the server's model and each site's own at every site.

    `min_clients` counts the answers about the server's model; of the sites' models, those that are
    missing leave a hole.

    Client script: examples/cross-site/client.py
        It sends metrics of what it receives, and its best local model when it is asked for that.

            if flare.is_evaluate():
                meta = {"NUM_EVAL_EXAMPLES": int((~rows).sum())}
                flare.send(flare.FLModel(metrics={"accuracy": score}, meta=meta))
            elif flare.is_submit_model():
                flare.send(flare.FLModel(params=best_params))

    Raises:
        RecipeError (also a pydantic.ValidationError): a field that cannot work, with its name, its
            value and the remedy.
    """

    cross_site_eval: ClassVar[Literal[True]] = True

    keep_updates: Literal["all", "last", "none"] = Field(
        default="all",
        description="whose updates stay in the store after their round: of all rounds, of the last, of none; hashes stay",
    )
