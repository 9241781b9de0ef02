"""The requirements on a round's updates, for running, verifying and replaying it."""

from fedpool.exclude import excluded
from fedpool.messages import Task
from fedpool.recipe import Recipe
from fedpool.tasks.arithmetic import Arithmetic
from fedpool.tasks.expected import Expected
from fedpool.tasks.slots import beside_spec
from fedpool.tasks.strategy import Strategy
from fedpool.tensors import Digest, Tensors


def expected(
    recipe: Recipe,
    strategy: Strategy,
    job_id: str,
    number: int,
    task: Task,
    head: Digest,
    base: Tensors,
    holes: frozenset[str] | None,
    arithmetic: Arithmetic,
) -> Expected:
    """The requirements on a round's updates.

    Args:
        head: digest of the round's global model.
        base: that model.
        holes: names of tensors that may hold infinities; see `fedpool.tasks.holes`.
        arithmetic: of the job.
    """
    left_out = excluded(recipe.exclude_vars, base.spec)
    spec = {name: entry for name, entry in base.spec.items() if name not in left_out}
    trains = task == "train"
    return Expected(
        job_id=job_id,
        round=number,
        task=task,
        base_sha256=head.sha256,
        spec=spec | beside_spec(strategy.extras, spec) if trains else spec,
        transfer="FULL" if task == "submit_model" else recipe.params_transfer_type,
        base=base,
        max_norm=None if task == "submit_model" else recipe.max_update_norm,  # submitted models are only scored
        clip=recipe.clip_updates,
        positive_meta=strategy.positive_meta if trains else (),
        holes=holes,
        idle=arithmetic.idle_sites,
        eval_examples=arithmetic.eval_examples,
        filters=() if task == "evaluate" else recipe.filters,
        seed=recipe.seed,
        max_weight=recipe.max_weight,
        metric_ranges=recipe.metric_ranges,
        bounded=arithmetic.bounded,
    )
