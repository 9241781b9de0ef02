"""The environment in which a stored job is resumed by default: the one in which it began."""

from pathlib import Path

from fedpool.deployments.poc import PocEnv
from fedpool.deployments.prod import ProdEnv
from fedpool.deployments.sim import SimEnv
from fedpool.errors import RecipeError
from fedpool.store import Store
from fedpool.tasks.job_record import JobRecord


def environment_of(job: JobRecord, store: Store, home: Path) -> SimEnv | PocEnv | ProdEnv:
    """The environment of a job, with the settings that it began with, if this machine has it.

    A proof of concept that is down, or on another machine, is treated as production: only its store
    and its sites matter.

    Args:
        store: the store of the job.
        home: folder of the proof of concept, for a job whose record has none.

    Raises:
        RecipeError: the settings are not valid on this machine.
    """
    settings = dict(job.environment.settings) if job.environment is not None else {}
    try:
        if job.simulated:
            return SimEnv(clients=job.sites, workspace=Path(store.root), **settings)
        home = Path(settings.pop("home", home))
        if job.environment is not None and job.environment.type == PocEnv.__name__:
            proof = PocEnv(clients=job.sites, home=home, **settings)
            if proof.is_up():
                return proof
        return ProdEnv(store=store.url, storage_options=store.storage_options, sites=job.sites, **settings)
    except RecipeError as error:
        raise RecipeError(
            f"job {job.job_id} began with settings that are not valid here: {error}\n"
            f"Resume it in an environment of your choice: recipe.execute(env, resume={job.job_id!r})"
        ) from None
