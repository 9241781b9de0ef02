"""Submitted models become the global models of later rounds: copied tensor by tensor, in sorted
order of their sites.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from fedpool.arrays import save_and_hash
from fedpool.errors import IntegrityError
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.gate import Accepted
from fedpool.tasks.publish import copy_model, publish_submitted, submitted_digest
from fedpool.tensors import Digest, TensorReader
from tests.updates import sent_by

PATHS = JobPaths("job-1")
BASE = {"body": np.zeros(5, np.float32), "head": np.full(2, 7, np.float32)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def put(store: Store, path: str, params: dict[str, Any]) -> tuple[Digest, TensorReader]:
    with store.staged(path) as file:
        digest = save_and_hash(file, params)
    return digest, store.tensors(path, digest.size)


def submitted(store: Store, site: str, params: dict[str, Any] | None) -> Accepted:
    digest, tensors = put(store, PATHS.update(3, site), params) if params else (Digest("", 0), None)
    manifest = sent_by(
        site,
        round=3,
        task="submit_model",
        params_type="FULL" if params else None,
        sha256=digest.sha256 or None,
        size=digest.size,
    )
    return Accepted(manifest, "m", 1.0, tensors)


def test_models_are_published_to_the_bit_in_the_order_of_their_sites(store: Store) -> None:
    _, base = put(store, PATHS.global_model(3), BASE)
    models = {site: {"body": np.arange(5, dtype=np.float64) + at, "head": BASE["head"]} for at, site in enumerate("ba")}
    updates = [submitted(store, site, params) for site, params in models.items()]
    entries, changed = publish_submitted(store, PATHS, base, updates, 4)
    assert [(entry.owner, entry.round) for entry in entries] == [("a", 3), ("b", 3)] and changed == []
    for number, entry, site in ((4, entries[0], "a"), (5, entries[1], "b")):
        assert store.read_bytes(PATHS.global_model(number)) == store.read_bytes(PATHS.update(3, site))
        (update,) = (update for update in updates if update.site == site)
        assert (entry.sha256, entry.size) == (update.manifest.sha256, update.manifest.size)


def test_parameters_that_stay_at_the_sites_are_the_jobs_own(store: Store) -> None:
    _, base = put(store, PATHS.global_model(3), BASE)
    update = submitted(store, "a", {"body": np.ones(5, np.float32)})
    (entry,), _ = publish_submitted(store, PATHS, base, [update], 4)
    made = load(store.read_bytes(PATHS.global_model(4)))
    assert made["body"].tolist() == [1] * 5 and made["head"].tolist() == [7, 7]
    assert update.tensors is not None
    assert submitted_digest(base, update.tensors, 2) == Digest(entry.sha256, entry.size)


def test_a_site_without_a_model_is_left_out(store: Store) -> None:
    _, base = put(store, PATHS.global_model(3), BASE)
    entries, changed = publish_submitted(store, PATHS, base, [submitted(store, "a", None)], 4)
    assert entries == [] and changed == [] and not store.exists(PATHS.global_model(4))


def test_a_model_that_was_cut_short_takes_no_round_from_the_next(store: Store) -> None:
    _, base = put(store, PATHS.global_model(3), BASE)
    updates = [submitted(store, site, BASE) for site in ("a", "b")]
    os.truncate(store.full(PATHS.update(3, "a")), updates[0].manifest.size - 1)
    entries, changed = publish_submitted(store, PATHS, base, updates, 4)
    assert [entry.owner for entry in entries] == ["b"] and [found.site for found in changed] == ["a"]
    assert store.exists(PATHS.global_model(4)) and not store.exists(PATHS.global_model(5))


def test_a_global_model_is_copied_to_the_bit_or_not_at_all(store: Store) -> None:
    digest, _ = put(store, PATHS.global_model(1), BASE)
    copy_model(store, PATHS.global_model(1), digest, PATHS.global_model(2))
    assert store.read_bytes(PATHS.global_model(2)) == store.read_bytes(PATHS.global_model(1))
    with pytest.raises(IntegrityError, match=r"00001/global.safetensors has sha256 \w+, but 0000"):
        copy_model(store, PATHS.global_model(1), Digest("0" * 64, digest.size), PATHS.global_model(3))
    assert not store.exists(PATHS.global_model(3))
