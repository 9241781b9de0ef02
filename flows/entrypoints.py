"""The flows that deployments load, made when they are loaded: `fedpool.flows.entrypoints.fedavg`
for a recipe of fedpool's own, `fedpool.flows.entrypoints.own(server_lr)` for any other, with the
names of the fields that it adds to those of all recipes.
"""

import re
from typing import Any

from fedpool.flows.deployed import deployed, own_flow
from fedpool.flows.recipes import BUILT_IN, find_installed

_OWN = re.compile(r"own\(((?:[^\W\d]\w*(?:,[^\W\d]\w*)*)?)\)")


def __getattr__(name: str) -> Any:
    if found := _OWN.fullmatch(name):
        return own_flow(found[1].split(",") if found[1] else ())
    if name not in BUILT_IN:
        raise AttributeError(f"there is no flow {__name__}.{name}: there are {', '.join(BUILT_IN)} and own(NAMES)")
    kind = find_installed(BUILT_IN[name])
    assert kind is not None, "it is one of fedpool's own"
    return deployed(kind)
