"""`round.json`, the commit of a round: what was asked, what came, what it was made into."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedpool.manifest import PROTOCOL
from fedpool.model import NUM_EVAL_EXAMPLES, NUM_STEPS
from fedpool.recipe import SERVER
from fedpool.tasks.arithmetic import CURRENT, Arithmetic
from fedpool.tasks.gate import Accepted, Failed, Late, Outcome, Probed, Rejected
from fedpool.tasks.metrics import denominators, mean_metrics
from fedpool.tensors import Digest

Record = Mapping[str, Any]


def round_record(
    *,
    job_id: str,
    round: int,
    task: str,
    outcomes: Collection[Outcome],
    not_asked: Mapping[str, str] | None = None,
    known_weights: Mapping[str, float],
    owner: str = SERVER,
    origin: int | None = None,
    base: Digest,
    following: Digest | None,
    state: Digest | None,
    models: Sequence[Mapping[str, Any]] | None = None,
    previous_sha256: str,
    timings: Mapping[str, float],
    arithmetic: Arithmetic = CURRENT,
) -> dict[str, Any]:
    """The record of a round.

    Args:
        outcomes: one for each time that a site was asked.
        not_asked: site -> why the round went ahead without asking it.
        known_weights: site -> weight of its last training update, for scores that come without one.
        owner: whose model the round's global one is.
        origin: the round that it is the start of; of a site's, the one that it was submitted in; None for this very round.
        base: the round's global model; the record's metrics are its score.
        following: the next global model; None when the round made none.
        state: what the strategy carries into the next round; None when it carries nothing, and after an evaluation.
        models: where sites submitted models: whose are scored in the rounds that follow, in their order.
        previous_sha256: hash of the previous round's record; in round 0, of `job.json`.
        timings: name -> seconds.
        arithmetic: of the job.
    """
    ordered = arithmetic.by_site(sorted(outcomes, key=lambda outcome: outcome.attempt), lambda outcome: outcome.site)
    accepted = [_accepted(outcome, known_weights, arithmetic) for outcome in ordered if isinstance(outcome, Accepted)]
    return {
        "protocol": PROTOCOL,
        "job_id": job_id,
        "round": round,
        "task": task,
        "sites": arithmetic.ordered({outcome.site for outcome in ordered} | set(not_asked or ())),
        "accepted": accepted,
        "rejected": [
            {
                "site": outcome.site,
                "attempt": outcome.attempt,
                "sha256": outcome.manifest.sha256 if outcome.manifest else None,
                "manifest_sha256": outcome.manifest_sha256,
                "code": outcome.code,
                "reason": outcome.reason,
            }
            for outcome in ordered
            if isinstance(outcome, Rejected)
        ],
        "failed": [
            {
                "site": outcome.site,
                "attempt": outcome.attempt,
                "cause": outcome.cause,
                **({"away": True} if outcome.away else {}),
            }
            for outcome in ordered
            if isinstance(outcome, Failed)
        ],
        "probed": [
            {
                "site": outcome.site,
                "attempt": outcome.attempt,
                "sha256": outcome.update.manifest.sha256,
                "manifest_sha256": outcome.update.manifest_sha256,
            }
            for outcome in ordered
            if isinstance(outcome, Probed)
        ],
        "late": [
            {"site": outcome.site, "attempt": outcome.attempt} for outcome in ordered if isinstance(outcome, Late)
        ],
        **(
            {"not_asked": [{"site": site, "reason": not_asked[site]} for site in arithmetic.ordered(not_asked)]}
            if not_asked
            else {}
        ),
        "metrics": mean_metrics((metrics_weight(entry), entry["metrics"]) for entry in accepted),
        "denominators": denominators((metrics_weight(entry), entry["metrics"]) for entry in accepted),
        "logged": mean_metrics((entry["weight"], entry["logged"]) for entry in accepted),
        "timings": {name: round_ms(value) for name, value in timings.items()},
        "model": {"owner": owner, "round": round if origin is None else origin},
        "global": {"sha256": base.sha256, "size": base.size},
        "next_global": {"sha256": following.sha256, "size": following.size} if following else None,
        "state": {"sha256": state.sha256, "size": state.size} if state else None,
        **({} if models is None else {"models": list(models)}),
        "previous_sha256": previous_sha256,
    }


def _accepted(outcome: Accepted, known_weights: Mapping[str, float], arithmetic: Arithmetic) -> dict[str, Any]:
    manifest = outcome.manifest
    weight = outcome.weight
    num_examples = manifest.meta.get(NUM_EVAL_EXAMPLES) if arithmetic.eval_examples else None
    if manifest.task == "evaluate" and NUM_STEPS not in manifest.meta:
        weight = known_weights.get(outcome.site, weight)
    return {
        "site": outcome.site,
        "attempt": outcome.attempt,
        "sha256": manifest.sha256,
        "manifest_sha256": outcome.manifest_sha256,
        "size": manifest.size,
        "params_type": manifest.params_type,
        "weight": weight,
        **({} if num_examples is None else {"num_eval_examples": float(num_examples)}),
        "metrics": manifest.metrics,
        "logged": manifest.logged,
        "seconds": round_ms(manifest.seconds),
        **({} if outcome.norm is None else {"norm": outcome.norm, "scale": outcome.scale}),
    }


def metrics_weight(entry: Mapping[str, Any]) -> float:
    """What an accepted update's metrics count with: the examples that they are of, where the site says so, else its weight."""
    weight: float = entry.get("num_eval_examples", entry["weight"])
    return weight


def round_ms(seconds: float) -> float:
    """Seconds to the millisecond."""
    return float(f"{seconds:.3f}")


def known_weights(records: Sequence[Record]) -> dict[str, float]:
    """site -> weight of its last accepted training update."""
    return {
        entry["site"]: entry["weight"]
        for record in records
        if record["task"] == "train"
        for entry in record["accepted"]
    }


def of_global_models(records: Sequence[Record]) -> list[Record]:
    """The rounds that score the global model which they are the start of: no submissions, and no models of other rounds."""
    return [
        record for record in records if record["task"] != "submit_model" and record["model"]["round"] == record["round"]
    ]


def num_trained(records: Sequence[Record]) -> int:
    """How many of a job's rounds trained: they come first."""
    return sum(record["task"] == "train" for record in records)
