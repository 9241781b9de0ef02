"""The model that a deployment's job starts from if it continues the previous one (`warm_start`)."""

from prefect.logging import get_run_logger

from fedpool.errors import RecipeError
from fedpool.initial import InitialModel
from fedpool.paths import JobPaths
from fedpool.recipe import Recipe
from fedpool.store import Store
from fedpool.stored_model import StoredModel
from fedpool.tasks.job_record import JobRecord, JobResult
from fedpool.tasks.record import RoundRecord


def last_model(recipe: Recipe, store: Store) -> InitialModel | None:
    """The final model of the last job with the recipe's name that trained and completed.

    Raises:
        RecipeError: the model has other parameters than the recipe's.
    """
    for job_id in sorted((name for name in store.names("") if name.startswith(f"{recipe.name}-")), reverse=True):
        paths = JobPaths(job_id)
        if not store.exists(paths.result):
            continue
        result = JobResult.read(store, paths.result)
        if result.status != "COMPLETED" or not result.num_rounds:
            continue
        job = JobRecord.read(store, paths.job)
        if job.fields["name"] != recipe.name:
            continue
        digest = RoundRecord.read(store, paths.record(result.num_rounds - 1)).next_global
        assert digest is not None, "a training round makes a model"
        model = StoredModel(store, paths.global_model(result.num_rounds), digest, job.holes)
        if dict(model.spec) != dict(recipe.model.spec):
            raise RecipeError(
                f"warm_start: the model of job {job_id} has other parameters than the recipe's: leave out warm_start"
            )
        get_run_logger().info("starting from the final model of job %s", job_id)
        return model
    return None
