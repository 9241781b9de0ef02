"""`ProdEnv`: production. Others run the server, store and sites; this process submits jobs."""

from typing import Any

from pydantic import Field, SecretStr, field_validator

from fedpool.deployments.remote import RemoteEnv
from fedpool.errors import RecipeError
from fedpool.paths import check_new_names
from fedpool.recipe import Recipe
from fedpool.store import Store


class ProdEnv(RemoteEnv):
    """An existing Prefect server, any fsspec store, and sites with their work pools.

    Credentials are never part of a recipe, a job or a log. Those of the server come from the usual
    Prefect settings (`PREFECT_API_AUTH_STRING`, `PREFECT_CLIENT_CUSTOM_HEADERS`, ...), those of the
    store from the environment of each process that uses it.

    Raises:
        RecipeError (also a pydantic.ValidationError): a field is invalid.
    """

    coordinator_here = False

    api_url: str | None = Field(default=None, description="URL of the Prefect API; default: the Prefect setting")
    auth_string: SecretStr | None = Field(
        default=None, description="basic auth string of the server; default: the Prefect setting"
    )
    store: str = Field(description="fsspec URL of the store, e.g. s3://fl-jobs")
    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        description="fsspec options for this process only; other processes use their environment",
        repr=False,
    )
    sites: tuple[str, ...] = Field(description="names of the sites that take part", min_length=1)

    @field_validator("sites")
    @classmethod
    def _names_fit(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_new_names("site", value)
        if len(set(value)) < len(value):
            raise RecipeError(f"sites={list(value)} has the same name twice")
        return value

    @field_validator("api_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise RecipeError(f"api_url={value!r} is not a URL: write it as https://host/api")
        return value.rstrip("/") if value else value

    def site_names(self, recipe: Recipe) -> tuple[str, ...]:
        return self.sites

    def open_store(self) -> Store:
        return Store(self.store, **self.storage_options)

    @property
    def server_remedy(self) -> str | None:
        return "start it, or correct api_url" if self.api_url else None

    def settings(self) -> dict[Any, Any]:
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

        given: dict[Any, Any] = {}
        if self.api_url:
            given[PREFECT_API_URL] = self.api_url
        elif not PREFECT_API_URL.value():
            raise RecipeError("no Prefect server is configured: give api_url, or set PREFECT_API_URL")
        if self.auth_string:
            given[PREFECT_API_AUTH_STRING] = self.auth_string.get_secret_value()
        return given
