"""Where a recipe runs, as the recipe sees it; `fedpool.deployments` has the environments."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from fedpool.errors import RecipeError

if TYPE_CHECKING:
    from fedpool.recipe import Recipe

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Begin:
    """How a job begins: anew, from its last committed round, or from a model of another job.

    Attributes:
        resume: id of an existing job, which continues from its last committed round. A completed
            job is left as it is.
        fork: create a new job instead, which starts from a model of the job that `resume` names.
        from_round: the round whose global model a fork starts from; None: the newest.

    Raises:
        RecipeError: the values don't fit together.
    """

    resume: str | None = None
    fork: bool = False
    from_round: int | None = None

    def __post_init__(self) -> None:
        if self.resume is None and (self.fork or self.from_round is not None):
            raise RecipeError("fork and from_round need resume: the id of the job to start from")
        if self.from_round is not None and not self.fork:
            raise RecipeError(
                f"from_round={self.from_round} without fork=True: a resumed job continues from its last committed round"
            )


ANEW = Begin()


class Environment(Protocol[R_co]):
    """Where a recipe runs. In fedpool's own, the handle on the job is a `fedpool.Run`."""

    def execute(self, recipe: "Recipe", begin: Begin = ANEW, *, wait: bool = True) -> R_co:
        """Run the recipe."""
        ...


class DeployingEnvironment(Environment[R_co], Protocol[R_co]):
    """An environment that can also run a recipe later and repeatedly."""

    def deploy(
        self,
        recipe: "Recipe",
        *,
        schedule: str | timedelta | Sequence[str | timedelta] | None = None,
        warm_start: bool = False,
    ) -> str:
        """Register the recipe."""
        ...


def check_environment(env: object, asked: Literal["execute", "deploy"]) -> None:
    """Refuse an object that isn't a suitable environment.

    Args:
        asked: the method that it needs.

    Raises:
        RecipeError: it isn't an environment, or lacks the method.
    """
    if isinstance(env, type) and hasattr(env, asked):
        raise RecipeError(f"env is the class {env.__name__}: give an instance, {env.__name__}(...)")
    if hasattr(env, asked):
        return
    if hasattr(env, "execute"):
        raise RecipeError(f"env is a {type(env).__name__}, which cannot deploy: give a PocEnv or a ProdEnv")
    raise RecipeError(f"env={env!r} is not an environment: give one, such as SimEnv(num_clients=2)")
