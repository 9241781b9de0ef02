"""fedpool: federated learning as Prefect flows.

Names are resolved when first used (PEP 562), so that a client script, which imports `fedpool.client`, pays for nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedpool.startup import collector_off

if TYPE_CHECKING:
    from fedpool.deployments.poc import PocEnv
    from fedpool.deployments.prod import ProdEnv
    from fedpool.deployments.run import JobStatus, Result, Run
    from fedpool.deployments.sim import SimEnv
    from fedpool.errors import (
        ClientError,
        ConfigError,
        FedpoolError,
        IntegrityError,
        JobCancelled,
        JobError,
        JobFailed,
        RecipeError,
        RoundError,
        ServerError,
        SiteError,
        StoreError,
    )
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
    from fedpool.model import FLModel, ParamsType
    from fedpool.recipe import Recipe
    from fedpool.store import Store

_HOMES = {
    "fedpool.deployments.poc": ("PocEnv",),
    "fedpool.deployments.prod": ("ProdEnv",),
    "fedpool.deployments.run": ("JobStatus", "Result", "Run"),
    "fedpool.deployments.sim": ("SimEnv",),
    "fedpool.errors": (
        "ClientError",
        "ConfigError",
        "FedpoolError",
        "IntegrityError",
        "JobCancelled",
        "JobError",
        "JobFailed",
        "RecipeError",
        "RoundError",
        "ServerError",
        "SiteError",
        "StoreError",
    ),
    "fedpool.flows.cross_site": ("CrossSiteEvalRecipe",),
    "fedpool.flows.cyclic": ("CyclicRecipe",),
    "fedpool.flows.diloco": ("DiLoCoRecipe",),
    "fedpool.flows.ditto": ("DittoRecipe",),
    "fedpool.flows.fedavg": ("FedAvgRecipe",),
    "fedpool.flows.fedbn": ("FedBNRecipe",),
    "fedpool.flows.fedeval": ("FedEvalRecipe",),
    "fedpool.flows.fednova": ("FedNovaRecipe",),
    "fedpool.flows.fedopt": ("FedOptRecipe",),
    "fedpool.flows.fedprox": ("FedProxRecipe",),
    "fedpool.flows.scaffold": ("ScaffoldRecipe",),
    "fedpool.model": ("FLModel", "ParamsType"),
    "fedpool.recipe": ("Recipe",),
    "fedpool.store": ("Store",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ClientError",
    "ConfigError",
    "CrossSiteEvalRecipe",
    "CyclicRecipe",
    "DiLoCoRecipe",
    "DittoRecipe",
    "FLModel",
    "FedAvgRecipe",
    "FedBNRecipe",
    "FedEvalRecipe",
    "FedNovaRecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "FedpoolError",
    "IntegrityError",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobStatus",
    "ParamsType",
    "PocEnv",
    "ProdEnv",
    "Recipe",
    "RecipeError",
    "Result",
    "RoundError",
    "Run",
    "ScaffoldRecipe",
    "ServerError",
    "SimEnv",
    "SiteError",
    "Store",
    "StoreError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedpool' has no attribute {name!r}")
    with collector_off():
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
