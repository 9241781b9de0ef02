"""The recipes that there are: a name for each that comes with fedpool, and those that installed
packages register.

An algorithm of fedpool's own is named here and in its own file, and nowhere else: the facade, the
deployments and the catalogue go by this. Nothing is imported before it is used, because the facade
looks here when a client script imports `fedpool.client`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from fedpool.recipe import Recipe

__all__ = [
    "CrossSiteEvalRecipe",
    "CyclicRecipe",
    "DiLoCoRecipe",
    "DittoRecipe",
    "FedAvgRecipe",
    "FedBNRecipe",
    "FedEvalRecipe",
    "FedNovaRecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "ScaffoldRecipe",
]

BUILT_IN: Mapping[str, str] = {
    name: f"fedpool.flows.{name}:{kind}"
    for name, kind in {
        "fedavg": "FedAvgRecipe",
        "fedprox": "FedProxRecipe",
        "fedopt": "FedOptRecipe",
        "scaffold": "ScaffoldRecipe",
        "fednova": "FedNovaRecipe",
        "diloco": "DiLoCoRecipe",
        "cyclic": "CyclicRecipe",
        "ditto": "DittoRecipe",
        "fedbn": "FedBNRecipe",
        "fedeval": "FedEvalRecipe",
        "cross_site": "CrossSiteEvalRecipe",
    }.items()
}
"""Name -> `module:Class`, in the order in which they are shown. The name is that of the file and
of the deployments' flow.
"""

GROUP = "fedpool.recipes"
"""The entry point group by which an installed package registers a recipe: `name =
"package.module:Class"`.
"""

_OF_CLASS = {full.rpartition(":")[2]: full for full in BUILT_IN.values()}


def class_name(full: str) -> str:
    """What a recipe's class is called, as people are shown it."""
    return full.rpartition(":")[2]


def type_of(kind: "type[Recipe]") -> str:
    """A recipe's class as `job.json` names it, `module:Class`."""
    return f"{kind.__module__}:{kind.__qualname__}"


def full_type(recorded: str) -> str:
    """The `module:Class` that a job means; jobs of an earlier version have the class alone,
    which is one of fedpool's.
    """
    return recorded if ":" in recorded else _OF_CLASS.get(recorded, recorded)


def flow_name(kind: "type[Recipe]") -> str | None:
    """The name of a recipe of fedpool's own; None for any other."""
    return next((name for name, full in BUILT_IN.items() if full == type_of(kind)), None)


def built_in() -> "Mapping[str, type[Recipe]]":
    """The recipes of fedpool's own by the names of their classes."""
    return {class_name(full): _load(full) for full in BUILT_IN.values()}


def is_registered(full: str) -> bool:
    """Whether an installed package registers a class, `module:Class`, as a recipe."""
    from importlib.metadata import entry_points  # what a client script can do without

    return any(entry.value == full for entry in entry_points(group=GROUP))


def find_installed(full: str) -> "type[Recipe] | None":
    """The class that is `module:Class`, of fedpool's own or registered; None when it is neither:
    then nothing is imported.
    """
    return _load(full) if full in BUILT_IN.values() or is_registered(full) else None


def _load(full: str) -> "type[Recipe]":
    module, _, name = full.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    kind: type[Recipe] = found
    return kind


def __getattr__(name: str) -> Any:
    if name not in _OF_CLASS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(_OF_CLASS[name])
