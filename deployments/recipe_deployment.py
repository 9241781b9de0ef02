"""The Prefect deployment that runs a recipe, with a form of its fields."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fedpool.deployments.overlap import Overlap, described, limit
from fedpool.flows.recipes import flow_name
from fedpool.recipe import Recipe
from fedpool.tasks.prefect_internals import form_schema

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.schedules import Schedule

_AD_HOC = "execute"
"""Prefix of `execute`'s own deployments, one for each form of a recipe's fields."""


async def make_deployment(
    client: "PrefectClient",
    recipe: Recipe,
    name: str | None,
    *,
    pool: str,
    parameters: dict[str, Any],
    schedules: Sequence["Schedule"] = (),
    overlap: Overlap | None = None,
) -> UUID:
    """Register a recipe as a deployment of its flow; returns the deployment's id.

    Args:
        name: name of the deployment; None: the one through which `execute` runs such recipes.
        pool: work pool that runs the flow.
        parameters: default parameters of its runs.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    from fedpool.flows.deployed import deployed, entrypoint_of

    flow, entrypoint = deployed(type(recipe)), entrypoint_of(type(recipe))
    schema = form_schema(flow)
    most, options = limit(overlap)
    deployment: UUID = await client.create_deployment(
        flow_id=await client.create_flow(flow),
        name=name or _ad_hoc_name(type(recipe), entrypoint, schema),
        work_pool_name=pool,
        entrypoint=entrypoint,
        parameters=parameters,
        parameter_openapi_schema=schema,
        enforce_parameter_schema=True,
        schedules=[DeploymentScheduleCreate.from_schedule(schedule) for schedule in schedules],
        concurrency_limit=most,
        concurrency_options=options,
        description=f"{type(recipe).__name__} of {recipe.name}. {described(overlap)}",
        tags=["fedpool"],
    )
    return deployment


def _ad_hoc_name(kind: type[Recipe], entrypoint: str, schema: Mapping[str, Any]) -> str:
    """Name for `execute`. Classes with the same name may have different forms, hence the hash."""
    name = f"{_AD_HOC}-{kind.__name__}"
    if flow_name(kind) is not None:
        return name
    return f"{name}-{hashlib.sha256(json.dumps([entrypoint, schema], sort_keys=True).encode()).hexdigest()[:8]}"
