"""All recipes by the name of their class, as `job.json` has it."""

from collections.abc import Mapping

from fedpool.errors import IntegrityError
from fedpool.flows.cross_site import CrossSiteEvalRecipe
from fedpool.flows.cyclic import CyclicRecipe
from fedpool.flows.diloco import DiLoCoRecipe
from fedpool.flows.ditto import DittoRecipe
from fedpool.flows.fedavg import FedAvgRecipe
from fedpool.flows.fedbn import FedBNRecipe
from fedpool.flows.fedeval import FedEvalRecipe
from fedpool.flows.fednova import FedNovaRecipe
from fedpool.flows.fedopt import FedOptRecipe
from fedpool.flows.fedprox import FedProxRecipe
from fedpool.flows.scaffold import ScaffoldRecipe
from fedpool.flows.staging import restore
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.store import Store

RECIPES: Mapping[str, type[Recipe]] = {
    kind.__name__: kind
    for kind in (
        FedAvgRecipe,
        FedProxRecipe,
        FedOptRecipe,
        ScaffoldRecipe,
        FedNovaRecipe,
        DiLoCoRecipe,
        CyclicRecipe,
        DittoRecipe,
        FedBNRecipe,
        FedEvalRecipe,
        CrossSiteEvalRecipe,
    )
}


def recipe_of(job_id: str, store: Store) -> Recipe:
    """The recipe of a job, as the store holds it.

    Raises:
        FileNotFoundError: there is no such job.
        IntegrityError: what lies there is not what its `job.json` says, or of a class that is not known here.
    """
    path = JobPaths(job_id).job
    described = store.read_json(path).get("recipe")
    kind = str(described.get("type")) if isinstance(described, dict) else "none"
    if kind not in RECIPES:
        raise IntegrityError(f"{store.full(path)} has a recipe of class {kind!r}: known are {', '.join(RECIPES)}")
    return restore(RECIPES[kind], job_id, store)
