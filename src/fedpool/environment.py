"""Where a recipe runs, as the recipe sees it; see `fedpool.deployments` for the environments that there are."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

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
