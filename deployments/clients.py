"""The fields that name the sites in `SimEnv` and `PocEnv`, which create their own sites."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from fedpool.errors import RecipeError
from fedpool.fields import Checked
from fedpool.paths import check_new_names


class NamedClients(Checked):
    """`num_clients` or `clients`; only one of them may be given."""

    num_clients: int | None = Field(default=None, description="number of sites, named site-1, site-2, ...", ge=1)
    clients: tuple[str, ...] | None = Field(default=None, description="names of the sites, instead of num_clients")

    @field_validator("clients")
    @classmethod
    def _names_fit(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        check_new_names("client", value or ())
        if value is not None and (not value or len(set(value)) < len(value)):
            raise RecipeError(f"clients={list(value)} must be one or more distinct names")
        return value

    @model_validator(mode="after")
    def _one_way_to_name_sites(self) -> Self:
        if self.clients is not None and self.num_clients not in (None, len(self.clients)):
            raise RecipeError(
                f"num_clients={self.num_clients}, but clients has {len(self.clients)} names: give only one of the two"
            )
        return self

    def names_or(self, default: int) -> tuple[str, ...]:
        """The sites' names.

        Args:
            default: number of sites if neither field is given.
        """
        return self.clients or tuple(f"site-{number + 1}" for number in range(self.num_clients or default))
