"""Which store a command uses. All commands follow one rule, and their first line of output names
the store.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fedpool.deployments.poc import PocEnv
from fedpool.errors import ConfigError
from fedpool.store import Store

STORE_VARIABLE = "FEDPOOL_STORE"
_DEFAULT = Path("fedpool-runs")


@dataclass(frozen=True, slots=True)
class MeantStore:
    """A store, and why it was chosen.

    Attributes:
        store: the store.
        why: the reason.
        hint: another place with jobs, or nothing.
    """

    store: Store
    why: str
    hint: str = ""

    def __str__(self) -> str:
        place = self.store.root if self.store.is_local else self.store.url
        return f"store: {place} ({self.why})" + (f"\n{self.hint}" if self.hint else "")


def meant_store(url: str | None, home: Path) -> MeantStore:
    """The store of a command: the one that is given, else that of `FEDPOOL_STORE`, else that of the
    running proof of concept, else the folder `fedpool-runs` here.

    Args:
        url: the value of `--store`.
        home: folder of the proof of concept.

    Raises:
        ConfigError: the store can't be opened.
    """
    proof = PocEnv(home=home)
    for given, why in ((url, "--store"), (os.environ.get(STORE_VARIABLE), STORE_VARIABLE)):
        if given:
            return MeantStore(_open(given, proof), why)
    if proof.is_up():
        return MeantStore(proof.open_store(), f"of the proof of concept in {proof.home}")
    left = proof.home / "store"
    down = f"The proof of concept is down. For its jobs: --store {left}" if left.is_dir() else ""
    return MeantStore(Store(_DEFAULT.absolute()), "the folder of simulations here", down)


def _open(url: str, proof: PocEnv) -> Store:
    try:
        known = proof.open_store() if proof.is_up() else None
    except ConfigError:
        known = None
    store = Store(url)
    return known if known is not None and known.url == store.url else store  # the known one has the keys
