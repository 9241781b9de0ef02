"""A recipe as a deployment: the flow that `prefect deployment run`, a schedule or the UI starts.

`deployed(FedAvgRecipe)` makes a flow named `federated-job`. Its parameters are the recipe's fields,
with their bounds and descriptions, and a few more. Each run makes a new job from a *template*, a
staged job that never runs itself. If `job_id` names a job, the run continues that job instead. It
needs only the store and the sites' work pools.

Users' own classes have no flow in a module. Their deployments load `own(NAMES)`, with the names of
the fields that the class adds, because Prefect checks parameters by name. The class itself comes
from the template or the job.
"""

import asyncio
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from pydantic import AfterValidator, Field

from fedpool.errors import ConfigError, RecipeError
from fedpool.flows import overlap
from fedpool.flows.job import run_job
from fedpool.flows.recipes import flow_name
from fedpool.flows.staging import has_completed, stage
from fedpool.flows.stored import recipe_of
from fedpool.flows.take_up import take_up
from fedpool.flows.under_way import LOOK_AHEAD
from fedpool.flows.warm_start import last_model
from fedpool.paths import JobPaths, new_job_id
from fedpool.patience import pauses
from fedpool.recipe import Recipe
from fedpool.store import Store
from fedpool.tasks.dispatch import PoolSites
from fedpool.tasks.job_record import JobRecord
from fedpool.tasks.reach import site_problems
from fedpool.tasks.report.prefect_ui import Reporter
from fedpool.tasks.tracking import trackings
from fedpool.training_recipe import TrainingRecipe

_SITES_POLL_S = 2.0
"""Seconds between checks whether enough sites can take part."""

_Parameter = tuple[str, Any, Any, str]
"""A parameter of a form: its name, type, default and description."""

_REQUIRED = inspect.Parameter.empty

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-\d{8}-\d{6}-[0-9a-f]{6}")
"""The form of the ids that `new_job_id` makes."""

_LEFT_OUT = "<as in the template>"
"""Marks a parameter that a run of `own_flow` was not given, in the form of `prefect deploy`."""

_STAGED = frozenset({"name", "model", "train_script", "initial_ckpt", "include"})
"""Fields in the template but not in the form: files and objects of the user who deployed."""

_SHARED = tuple(name for name in TrainingRecipe.model_fields if name not in _STAGED)
"""Fields in the forms of all training recipes."""


def form_fields(kind: type[Recipe]) -> list[str]:
    """Names of a recipe's fields that a run may change."""
    return [name for name, field in kind.model_fields.items() if name not in _STAGED and not field.exclude]


def entrypoint_of(kind: type[Recipe]) -> str:
    """The path of the flow for a recipe's deployments; see `fedpool.flows.entrypoints`."""
    own = ",".join(sorted(set(form_fields(kind)) - set(_SHARED)))
    return f"fedpool.flows.entrypoints.{flow_name(kind) or f'own({own})'}"


def deployed(kind: type[Recipe]) -> "Flow[..., Any]":
    """The flow of a recipe class.

    Raises:
        RecipeError: a field has the name of a parameter that every deployment has.
    """
    return _flow(kind, f"Run a {kind.__name__} at sites behind work pools.", [*_common(), *_form(kind)])


def own_flow(names: Sequence[str]) -> "Flow[..., Any]":
    """The flow of every recipe class that adds fields with these names to those of all recipes."""
    form = [(name, Any, _LEFT_OUT, "") for name in (*_SHARED, *names)]
    return _flow(None, "Run a recipe of your own class at sites behind work pools.", [*_common(), *form])


def _flow(kind: type[Recipe] | None, head: str, own: Sequence[_Parameter]) -> "Flow[..., Any]":
    async def federated_job(**given: Any) -> State[Any]:
        return await _run(kind, **{name: value for name, value in given.items() if value != _LEFT_OUT})

    # Prefect reads types and bounds from the signature, and descriptions from the docstring.
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        (inspect.Parameter(name, keyword_only, annotation=annotation, default=default), description)
        for name, annotation, default, description in own
    ]
    federated_job.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter for parameter, _ in parameters], return_annotation=State[Any]
    )
    lines = [f"    {parameter.name}: {description}" for parameter, description in parameters]
    federated_job.__doc__ = "\n".join([head, "", "Args:", *lines])
    made: Flow[..., Any] = Flow(
        federated_job,
        name="federated-job",
        flow_run_name=_run_name,
        validate_parameters=False,
        persist_result=False,
    )
    return made


def _run_name() -> str:
    name = flow_run.get_name()
    if name and _JOB_ID.fullmatch(name):  # a retry keeps the name by which its job is found
        return str(name)
    return str(flow_run.get_parameters().get("job_id") or deployment.get_name() or "job")


def _common() -> list[_Parameter]:
    """The parameters of every form."""
    return [
        ("template", str, "", "id of the staged job that new jobs are made from"),
        ("store", str, _REQUIRED, "URL of the store; its credentials come from the environment"),
        ("sites", Annotated[list[str], Field(min_length=1)], _REQUIRED, "names of the sites that take part"),
        ("job_id", str | None, None, "continue this job instead of making a new one"),
        (
            "look_ahead",
            Annotated[int, Field(ge=0, le=100)],
            LOOK_AHEAD,
            "number of rounds announced to the sites before the current one ends; 0: each waits for the previous one",
        ),
        ("warm_start", bool, False, "start from the final model of this recipe's last completed job"),
        (
            "track",
            list[str],
            [],
            "trackers that get all scalars, such as mlflow:URI; their libraries must be installed where the job runs",
        ),
        (
            "cancel_earlier",
            bool,
            False,
            "first cancel this deployment's unfinished runs, and start when they have ended",
        ),
    ]


def _form(kind: type[Recipe]) -> Iterator[_Parameter]:
    """The parameters for a recipe's fields."""
    taken = {name for name, *_ in _common()}
    for name in form_fields(kind):
        if name in taken:
            raise RecipeError(
                f"{kind.__name__} has a field {name!r}, which is the name of a parameter of every deployment: rename it"
            )
        field = kind.model_fields[name]
        bounds = [entry for entry in field.metadata if not isinstance(entry, AfterValidator)]
        annotation = Annotated[(field.annotation, *bounds)] if bounds else field.annotation
        default = _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        yield name, annotation, default, field.description or ""


async def _run(
    kind: type[Recipe] | None,
    *,
    template: str,
    store: str,
    sites: list[str],
    job_id: str | None,
    look_ahead: int,
    warm_start: bool,
    cancel_earlier: bool,
    track: list[str] | None = None,
    **fields: Any,
) -> State[Any]:
    storage = Store(store)
    if cancel_earlier and job_id is None:
        await overlap.cancel_earlier()
    if job_id is None or _is_run_again():  # otherwise the submission has checked the sites
        needed, patience_s = await asyncio.to_thread(_needs, storage, job_id or template, fields)
        await _wait_for_sites(sites, needed, patience_s)
    staged = job_id or await asyncio.to_thread(_begun_before, storage)
    if staged is None:
        recipe = await asyncio.to_thread(_remade, kind, template, storage, sites, warm_start, fields)
        staged = new_job_id(recipe.name)
        environment = (await asyncio.to_thread(JobRecord.read, storage, JobPaths(template).job)).environment
        if environment is not None and track:  # a resumed job uses this run's trackers
            environment = environment.model_copy(update={"settings": {**environment.settings, "track": track}})
        await asyncio.to_thread(partial(stage, environment=environment), recipe, staged, storage, tuple(sites))
        await _name_after(staged)
    else:
        recipe = await asyncio.to_thread(recipe_of, staged, storage, kind)
    get_run_logger().info("job %s is in %s", staged, storage.full(staged))
    with storage.held(staged):
        if await asyncio.to_thread(has_completed, storage, staged):
            return Completed(message=f"job {staged} had already ended")
        here = partial(take_up, observers=(Reporter(), *trackings(track)))
        job = await asyncio.to_thread(here, recipe, staged, storage, PoolSites(sites), look_ahead)
        return await overlap.outlasting_its_slot(run_job(job))


def _needs(store: Store, staged: str, fields: Mapping[str, Any]) -> tuple[int, float]:
    """The number of sites that every round needs, and the seconds to wait for them.

    The run's own values override those of the staged job.
    """
    path = JobPaths(staged).job
    if "min_clients" in fields and "site_patience_s" in fields:
        known = fields
    elif store.exists(path):
        known = {**JobRecord.read(store, path).fields, **fields}
    else:
        raise _no_template(store, staged)
    return int(known["min_clients"]), float(known["site_patience_s"])


def _no_template(store: Store, template: str) -> RecipeError:
    return RecipeError(f"there is no staged job {template!r} in {store.url}: deploy the recipe again")


def _is_run_again() -> bool:
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.run_count > 1


async def _wait_for_sites(sites: list[str], needed: int, patience_s: float) -> None:
    """Wait until enough sites can take part; the rounds themselves wait for the others.

    Raises:
        ConfigError: too few can within that time; the message has the reasons and remedies.
    """
    logger, told = get_run_logger(), None
    async with get_client() as client:
        for pause_s in pauses(patience_s, _SITES_POLL_S):
            problems = await site_problems(client, sites)
            told_now = "\n".join(problem for of_site in problems.values() for problem in of_site)
            enough = len(sites) - len(problems) >= needed
            if told_now and told_now != told:
                logger.warning(
                    "%s\n%s",
                    "starting without:" if enough else "waiting, too many sites can't take part:",
                    told_now,
                )
                told = told_now
            if enough:
                return
            await asyncio.sleep(pause_s)
    raise ConfigError(
        f"{len(sites) - len(problems)} of {len(sites)} sites can take part, but min_clients is {needed}; that did not "
        f"change within {patience_s:g} s (site_patience_s)\n{told_now}"
    )


def _begun_before(store: Store) -> str | None:
    """The job of this flow run if Prefect is retrying the run."""
    context = FlowRunContext.get()
    name = context.flow_run.name if context and context.flow_run else ""
    return name if _JOB_ID.fullmatch(name) and store.exists(JobPaths(name).job) else None


async def _name_after(job_id: str) -> None:
    """Name the flow run after its job, so `fedpool job` finds it."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        async with get_client() as client:
            await client.update_flow_run(context.flow_run.id, name=job_id)


def _remade(
    kind: type[Recipe] | None, template: str, store: Store, sites: list[str], warm_start: bool, fields: dict[str, Any]
) -> Recipe:
    """The recipe of a template, with the fields that this run changes.

    Raises:
        RecipeError: the template doesn't exist, or the changed recipe can't run.
    """
    try:
        recipe = recipe_of(template, store, kind).revise(**fields)
    except FileNotFoundError:
        raise _no_template(store, template) from None
    recipe.check_sites(sites)
    if warm_start and (model := last_model(recipe, store)) is not None:
        recipe = recipe.revise(model=model)
    return recipe
