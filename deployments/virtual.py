"""A simulation's settings for virtual time; see `fedpool.tasks.virtual_time`."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from fedpool.deployments.clients import NamedClients
from fedpool.errors import RecipeError
from fedpool.recipe import Recipe
from fedpool.tasks.job_record import SPEEDS
from fedpool.tasks.virtual_time import check_speed, speeds_by_site

Speeds = tuple[float, ...] | dict[str, float] | None


class VirtualTime(NamedClients):
    """An environment whose sites may have speeds."""

    speeds: Speeds = Field(
        default=None,
        description="units of virtual time that each site needs for an assignment, in the order of the sites or by name; they, "
        "not this machine, determine which sites are late; default: real time",
    )

    @field_validator("speeds")
    @classmethod
    def _speeds_are_positive(cls, value: Speeds) -> Speeds:
        named = value if isinstance(value, dict) else {f"site {at + 1}": units for at, units in enumerate(value or ())}
        for site, units in named.items():
            check_speed(site, units)
        return value

    def virtual(self, recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
        """The sites' speeds for the settings in `job.json`; empty in real time.

        Raises:
            RecipeError: `speeds` does not match the sites, or the recipe depends on real time.
        """
        if self.speeds is None:
            return {}
        if recipe.round_timeout is not None:
            raise RecipeError(
                f"round_timeout={recipe.round_timeout:g} is in seconds of real time, speeds in units of virtual time: leave out "
                "one of them"
            )
        return {SPEEDS: speeds_by_site(self.speeds, names)}
