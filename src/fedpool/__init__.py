"""fedpool: federated learning as Prefect flows.

Names are resolved on first use (PEP 562), so a client script, which imports `fedpool.client`,
doesn't pay for the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedpool.flows import recipes
from fedpool.startup import collector_off

if TYPE_CHECKING:
    from fedpool.deployments.handle import JobStatus, Result, Run
    from fedpool.deployments.poc import PocEnv
    from fedpool.deployments.prod import ProdEnv
    from fedpool.deployments.sim import SimEnv
    from fedpool.errors import (
        ClientError,
        ConfigError,
        FedpoolError,
        FilterError,
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
    from fedpool.filters import ElementwiseFilter, Filter, FilterContext
    from fedpool.flows.recipes import *  # noqa: F403  # for type checkers; only that module lists the names
    from fedpool.model import FLModel, ParamsType
    from fedpool.recipe import Recipe
    from fedpool.store import Store
    from fedpool.tasks.aggregator import Aggregator
    from fedpool.tasks.aggregators import (
        Bulyan,
        GeometricMedian,
        Krum,
        Mean,
        Median,
        MultiKrum,
        NormClippedMean,
        TrimmedMean,
    )
    from fedpool.tasks.mean import weighted_mean
    from fedpool.tasks.strategy import State, Strategy, Update
    from fedpool.tensors import Tensors
    from fedpool.training_recipe import TrainingRecipe

_HOMES = {
    "fedpool.deployments.poc": ("PocEnv",),
    "fedpool.deployments.prod": ("ProdEnv",),
    "fedpool.deployments.handle": ("JobStatus", "Result", "Run"),
    "fedpool.deployments.sim": ("SimEnv",),
    "fedpool.errors": (
        "ClientError",
        "ConfigError",
        "FedpoolError",
        "FilterError",
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
    "fedpool.filters": ("ElementwiseFilter", "Filter", "FilterContext"),
    "fedpool.model": ("FLModel", "ParamsType"),
    "fedpool.recipe": ("Recipe",),
    "fedpool.store": ("Store",),
    "fedpool.tasks.aggregator": ("Aggregator",),
    "fedpool.tasks.aggregators": (
        "Bulyan",
        "GeometricMedian",
        "Krum",
        "Mean",
        "Median",
        "MultiKrum",
        "NormClippedMean",
        "TrimmedMean",
    ),
    "fedpool.tasks.mean": ("weighted_mean",),
    "fedpool.tasks.strategy": ("State", "Strategy", "Update"),
    "fedpool.tensors": ("Tensors",),
    "fedpool.training_recipe": ("TrainingRecipe",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_HOME |= dict.fromkeys(recipes.__all__, recipes.__name__)

__all__ = [
    "Aggregator",
    "Bulyan",
    "ClientError",
    "ConfigError",
    "ElementwiseFilter",
    "FLModel",
    "FedpoolError",
    "Filter",
    "FilterContext",
    "FilterError",
    "GeometricMedian",
    "IntegrityError",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobStatus",
    "Krum",
    "Mean",
    "Median",
    "MultiKrum",
    "NormClippedMean",
    "ParamsType",
    "PocEnv",
    "ProdEnv",
    "Recipe",
    "RecipeError",
    "Result",
    "RoundError",
    "Run",
    "ServerError",
    "SimEnv",
    "SiteError",
    "State",
    "Store",
    "StoreError",
    "Strategy",
    "Tensors",
    "TrainingRecipe",
    "TrimmedMean",
    "Update",
    "weighted_mean",
]
__all__ += recipes.__all__
__all__.sort()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedpool' has no attribute {name!r}")
    with collector_off():
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
