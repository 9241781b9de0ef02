"""How a recipe is run: by an environment, which gives a handle on the job, or as a deployment of
one.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fedpool.environment import Begin, DeployingEnvironment, Environment, check_environment

if TYPE_CHECKING:
    from fedpool.recipe import Recipe

R = TypeVar("R")


class Executable:
    """What a user does with a recipe, of which this is a base."""

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
            env: where.
            wait: block until the job has ended; False returns at once.
            resume: id of a job that was begun before: it goes on from its last committed round. One
                that has completed is left as it is.
            fork: make a new job instead, which starts from a model of the job that `resume` names,
                with this recipe.
            from_round: the round whose global model a fork starts from; None: its newest.

        Raises:
            RecipeError: the job that is to go on was begun with another recipe or at other sites;
                no environment was given.
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
        """Register the recipe as the deployment `federated-job/NAME`, which each run makes a new
        job of.

        Args:
            env: where: `PocEnv` or `ProdEnv`.
            schedule: when it runs by itself: a cron line ("0 2 * * 0"), a recurrence rule
                ("FREQ=WEEKLY"), an interval, or a list of those.
            options: more of the environment's, such as `warm_start`.

        Returns: the deployment's name, for `prefect deployment run`.
        """
        check_environment(env, "deploy")
        return env.deploy(cast("Recipe", self), schedule=schedule, **options)
