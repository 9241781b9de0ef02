"""The known recipes: fedpool's own, with a name for each, and those that installed packages
register.

An algorithm that comes with fedpool is named only here and in its own file: the facade, the
deployments and the catalogue use this list. Modules are imported on first use, because the facade
looks here when a client script imports `fedpool.client`.
"""

import re
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
"""Name -> `module:Class`, in display order. Files and deployments' flows have the same name."""

_ENTRYPOINT = re.compile(r"fedpool\.flows\.entrypoints\.(\w+|own\((?:[^\W\d]\w*(?:,[^\W\d]\w*)*)?\))")

GROUP = "fedpool.recipes"
"""The entry point group with which packages register recipes: `name = "package.module:Class"`."""

_OF_CLASS = {full.rpartition(":")[2]: full for full in BUILT_IN.values()}


def class_name(full: str) -> str:
    """The name of a recipe's class, as shown to people."""
    return full.rpartition(":")[2]


def type_of(kind: "type[Recipe]") -> str:
    """A recipe's class as in `job.json`, `module:Class`."""
    return f"{kind.__module__}:{kind.__qualname__}"


def full_type(recorded: str) -> str:
    """The `module:Class` of a job. Earlier versions wrote only the class, one of fedpool's."""
    return recorded if ":" in recorded else _OF_CLASS.get(recorded, recorded)


def flow_name(kind: "type[Recipe]") -> str | None:
    """The name of one of fedpool's recipes; None for any other."""
    return next((name for name, full in BUILT_IN.items() if full == type_of(kind)), None)


def built_in() -> "Mapping[str, type[Recipe]]":
    """Name of the class -> recipe, for fedpool's own recipes."""
    return {class_name(full): _load(full) for full in BUILT_IN.values()}


def entrypoint_name(entrypoint: str) -> str | None:
    """The name of a deployment's flow in `fedpool.flows.entrypoints`; None for any other flow."""
    found = _ENTRYPOINT.fullmatch(entrypoint)
    return found[1] if found and (found[1] in BUILT_IN or found[1].startswith("own(")) else None


def is_registered(full: str) -> bool:
    """Whether an installed package registers a class, `module:Class`, as a recipe."""
    from importlib.metadata import entry_points  # not needed by client scripts

    return any(entry.value == full for entry in entry_points(group=GROUP))


def find_installed(full: str) -> "type[Recipe] | None":
    """The class `module:Class` if it is fedpool's or registered; else None, without an import."""
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
