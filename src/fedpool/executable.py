"""Running a recipe: in an environment, which returns a handle on the job, or as a deployment."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fedpool.environment import Begin, DeployingEnvironment, Environment, check_environment

if TYPE_CHECKING:
    from fedpool.recipe import Recipe

R = TypeVar("R")


class Executable:
    """A recipe's methods for users; a base of `Recipe`."""

    def execute(
        self,
        env: Environment[R],
        *,
        wait: bool = True,
        resume: str | None = None,
        fork: bool = False,
        from_round: int | None = None,
    ) -> R:
        """Run the recipe in an environment; returns its handle on the job, a `Run`.

        Args:
            env: the environment.
            wait: block until the job has ended; False returns at once.
            resume: id of an existing job, which continues from its last committed round. A
                completed job is left as it is.
            fork: create a new job instead, with this recipe, which starts from a model of the job
                that `resume` names.
            from_round: the round whose global model a fork starts from; None: the newest.

        Raises:
            RecipeError: the job to resume was begun with another recipe or at other sites; no
                environment was given.
        """
        check_environment(env, "execute")
        return env.execute(cast("Recipe", self), Begin(resume, fork, from_round), wait=wait)

    def deploy(
        self,
        env: DeployingEnvironment[Any],
        *,
        schedule: str | timedelta | Sequence[str | timedelta] | None = None,
        **options: Any,
    ) -> str:
        """Register the recipe as the deployment `federated-job/NAME`; each run is a new job.

        Args:
            env: `PocEnv` or `ProdEnv`.
            schedule: when it runs automatically: a cron line ("0 2 * * 0"), a recurrence rule
                ("FREQ=WEEKLY"), an interval, or a list of those.
            options: the environment's other options, such as `warm_start`.

        Returns: the deployment's name, for `prefect deployment run`.
        """
        check_environment(env, "deploy")
        return env.deploy(cast("Recipe", self), schedule=schedule, **options)
