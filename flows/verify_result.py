"""Verifies the result of a job: it must follow from the job's rounds."""

import hashlib

from fedpool.flows.plan import best_model
from fedpool.flows.verify_errors import differs, says_otherwise
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.store import Store, to_json
from fedpool.tasks.causes import evaluation_error
from fedpool.tasks.job_record import JobResult
from fedpool.tasks.ledger import Ledger
from fedpool.tasks.matrix import cross_site_matrix
from fedpool.tensors import Digest


def verify_result(recipe: Recipe, store: Store, paths: JobPaths, ledger: Ledger) -> str | None:
    """Verify the job's result; returns the job's status, or None if it has no result yet.

    Args:
        recipe: the job's recipe.
        store: the job's store.
        paths: the job's paths.
        ledger: the ledger after all rounds, which are verified already.

    Raises:
        IntegrityError: the result or the cross-site scores don't follow from the rounds.
    """
    if not store.exists(paths.result):
        return None
    result = JobResult.read(store, paths.result)
    follows = {
        "sha256": result.own_sha256(),
        "job_id": paths.job_id,
        "num_rounds": ledger.num_trained,
        "num_records": ledger.number,
        "last_record_sha256": ledger.sha256,
        "cross_site": _cross_site(recipe, store, paths, ledger) if result.status == "COMPLETED" else None,
    }
    if "evaluation_error" in result.model_fields_set:  # jobs of earlier versions have none
        follows["evaluation_error"] = evaluation_error(ledger.records)
    for name, found in follows.items():
        if (said := getattr(result, name)) != found:
            raise says_otherwise(store, paths.result, name, said=said, found=found)
    return result.status


def _cross_site(recipe: Recipe, store: Store, paths: JobPaths, ledger: Ledger) -> Digest | None:
    """Verify the cross-site scores; returns their digest, or None if the recipe asks for none."""
    if not recipe.cross_site_eval:
        return None
    follows = to_json(cross_site_matrix(ledger.records, best_model(recipe, ledger.records)))
    if not store.exists(paths.cross_site):
        raise differs(store, paths.cross_site, "is missing")
    if store.read_bytes(paths.cross_site) != follows:
        raise differs(store, paths.cross_site, "does not follow from the rounds")
    return Digest(hashlib.sha256(follows).hexdigest(), len(follows))
