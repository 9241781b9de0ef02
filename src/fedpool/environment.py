"""Where a recipe runs, as the recipe sees it; see `fedpool.deployments` for the environments that there are."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fedpool.errors import RecipeError

if TYPE_CHECKING:
    from fedpool.recipe import Recipe


class Environment(Protocol):
    """Where a recipe runs."""

    def execute(
        self,
        recipe: "Recipe",
        *,
        wait: bool = True,
        resume: str | None = None,
        fork: bool = False,
        from_round: int | None = None,
    ) -> Any:
        """Run the recipe."""
        ...


class DeployingEnvironment(Environment, Protocol):
    """An environment that can run a recipe later and again."""

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
    """Refuse what a recipe cannot be given to.

    Args:
        asked: what it has to be able to do.

    Raises:
        RecipeError: it is not an environment, or not one that can do this.
    """
    if isinstance(env, type) and hasattr(env, asked):
        raise RecipeError(f"env is the class {env.__name__}: give an instance, {env.__name__}(...)")
    if hasattr(env, asked):
        return
    if hasattr(env, "execute"):
        raise RecipeError(f"env is a {type(env).__name__}, which cannot deploy: give a PocEnv or a ProdEnv")
    raise RecipeError(f"env={env!r} is not an environment: give one, such as SimEnv(num_clients=2)")
