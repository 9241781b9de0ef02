"""The flows that deployments load, created on first use.

`fedpool.flows.entrypoints.fedavg` is the flow of one of fedpool's recipes.
`fedpool.flows.entrypoints.own(server_lr)` is that of any other recipe, with the names of the fields
that it adds.
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
        raise AttributeError(f"there is no flow {__name__}.{name}: use {', '.join(BUILT_IN)} or own(NAMES)")
    kind = find_installed(BUILT_IN[name])
    assert kind is not None, "it is part of fedpool"
    return deployed(kind)
