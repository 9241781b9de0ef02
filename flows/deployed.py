"""A recipe as a deployment: the flow that `prefect deployment run`, a schedule or the UI starts.

`deployed(FedAvgRecipe)` makes a flow named `federated-job` whose parameters are the recipe's
fields, with their bounds and descriptions, and a few of its own. Each run is a new job, made from a
job that was staged as its template and never runs itself; or, when `job_id` names a job, that very
job, from where it is. The store and the sites' work pools are all it needs.

A class that is not fedpool's own has no flow in a module: its deployments load `own(NAMES)`, which
knows the names of the class's own fields, because Prefect checks parameters by their names. The
class itself is that of the template, or of the job.
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
"""How often to look whether enough sites can take part."""

_Parameter = tuple[str, Any, Any, str]
"""Of a form: its name, type, default and description."""

_REQUIRED = inspect.Parameter.empty

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-\d{8}-\d{6}-[0-9a-f]{6}")
"""What `new_job_id` makes."""

_LEFT_OUT = "<as in the template>"
"""Of a parameter that a run of `own_flow` was not given, as the form of `prefect deploy` shows
it.
"""

_STAGED = frozenset({"name", "model", "train_script", "initial_ckpt", "include"})
"""Fields that are in the template and not in the form: files and objects of whoever deployed."""

_SHARED = tuple(name for name in TrainingRecipe.model_fields if name not in _STAGED)
"""What the forms of all recipes that train have."""


def form_fields(kind: type[Recipe]) -> list[str]:
    """Names of a recipe's fields that a run may change."""
    return [name for name, field in kind.model_fields.items() if name not in _STAGED and not field.exclude]


def entrypoint_of(kind: type[Recipe]) -> str:
    """The path by which the coordinator finds the flow of a recipe's deployments; see
    `fedpool.flows.entrypoints`.
    """
    own = ",".join(sorted(set(form_fields(kind)) - set(_SHARED)))
    return f"fedpool.flows.entrypoints.{flow_name(kind) or f'own({own})'}"


def deployed(kind: type[Recipe]) -> "Flow[..., Any]":
    """The flow of a recipe class.

    Raises:
        RecipeError: a field has the name of a parameter that every deployment has.
    """
    return _flow(kind, f"Run a {kind.__name__} at sites behind work pools.", [*_common(), *_form(kind)])


def own_flow(names: Sequence[str]) -> "Flow[..., Any]":
    """The flow of every recipe class that has fields of these names beside those of all recipes."""
    form = [(name, Any, _LEFT_OUT, "") for name in (*_SHARED, *names)]
    return _flow(None, "Run a recipe of an own class at sites behind work pools.", [*_common(), *form])


def _flow(kind: type[Recipe] | None, head: str, own: Sequence[_Parameter]) -> "Flow[..., Any]":
    async def federated_job(**given: Any) -> State[Any]:
        return await _run(kind, **{name: value for name, value in given.items() if value != _LEFT_OUT})

    # Prefect reads the form's types and bounds off the signature, and its descriptions off the
    # docstring.
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
        on_crashed=[overlap.believe_the_store],
    )
    return made


def _run_name() -> str:
    name = flow_run.get_name()
    if name and _JOB_ID.fullmatch(name):  # it is run again, and keeps the name by which its job is found
        return str(name)
    return str(flow_run.get_parameters().get("job_id") or deployment.get_name() or "job")


def _common() -> list[_Parameter]:
    """What every form has."""
    return [
        ("template", str, "", "id of the staged job that this one is made from"),
        ("store", str, _REQUIRED, "URL of the store; its credentials are in the environment"),
        ("sites", Annotated[list[str], Field(min_length=1)], _REQUIRED, "names of the sites that take part"),
        ("job_id", str | None, None, "go on with this job instead of making a new one"),
        (
            "look_ahead",
            Annotated[int, Field(ge=0, le=100)],
            LOOK_AHEAD,
            "rounds that are announced to the sites ahead of the one that trains; 0: each waits for the one before",
        ),
        ("warm_start", bool, False, "start from the final model of the recipe's last completed job"),
        (
            "track",
            list[str],
            [],
            "trackers that get all scalars, such as mlflow:URI; their libraries are installed where the job runs",
        ),
        (
            "cancel_earlier",
            bool,
            False,
            "cancel the runs of this deployment that are still under way, and begin when they have ended",
        ),
    ]


def _form(kind: type[Recipe]) -> Iterator[_Parameter]:
    """A recipe's fields."""
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
    if job_id is None or _is_run_again():  # else whoever has submitted the job has looked
        needed, patience_s = await asyncio.to_thread(_needs, storage, job_id or template, fields)
        await _wait_for_sites(sites, needed, patience_s)
    staged = job_id or await asyncio.to_thread(_begun_before, storage)
    if staged is None:
        recipe = await asyncio.to_thread(_remade, kind, template, storage, sites, warm_start, fields)
        staged = new_job_id(recipe.name)
        environment = (await asyncio.to_thread(JobRecord.read, storage, JobPaths(template).job)).environment
        if environment is not None and track:  # with those of this run the job goes on, when it is resumed
            environment = environment.model_copy(update={"settings": {**environment.settings, "track": track}})
        await asyncio.to_thread(partial(stage, environment=environment), recipe, staged, storage, tuple(sites))
        await _name_after(staged)
    else:
        recipe = await asyncio.to_thread(recipe_of, staged, storage, kind)
    get_run_logger().info("job %s lies in %s", staged, storage.full(staged))
    with storage.held(staged):
        if await asyncio.to_thread(has_completed, storage, staged):
            return Completed(message=f"job {staged} had already ended")
        here = partial(take_up, observers=(Reporter(), *trackings(track)))
        job = await asyncio.to_thread(here, recipe, staged, storage, PoolSites(sites), look_ahead)
        return await overlap.outlasting_its_slot(run_job(job))


def _needs(store: Store, staged: str, fields: Mapping[str, Any]) -> tuple[int, float]:
    """How many sites every round needs, and the seconds to wait for them: the run's values, else
    those of what was staged.
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
    """Wait until as many sites as every round needs can take part; the rounds themselves wait for
    the others.

    Raises:
        ConfigError: they cannot, after that long; the message says why, and what to do.
    """
    logger, told = get_run_logger(), None
    async with get_client() as client:
        for pause_s in pauses(patience_s, _SITES_POLL_S):
            problems = await site_problems(client, sites)
            told_now = "\n".join(problem for of_site in problems.values() for problem in of_site)
            enough = len(sites) - len(problems) >= needed
            if told_now and told_now != told:
                logger.warning("%s\n%s", "going ahead without" if enough else "waiting for too many", told_now)
                told = told_now
            if enough:
                return
            await asyncio.sleep(pause_s)
    raise ConfigError(
        f"{len(sites) - len(problems)} of {len(sites)} sites can take part, min_clients is {needed}; that did not "
        f"change in {patience_s:g} s (site_patience_s)\n{told_now}"
    )


def _begun_before(store: Store) -> str | None:
    """The job of this flow run, when it is run again: Prefect retries a run that failed or
    crashed, where it is asked to.
    """
    context = FlowRunContext.get()
    name = context.flow_run.name if context and context.flow_run else ""
    return name if _JOB_ID.fullmatch(name) and store.exists(JobPaths(name).job) else None


async def _name_after(job_id: str) -> None:
    """Name the flow run after its job, by which `fedpool job` finds it."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        async with get_client() as client:
            await client.update_flow_run(context.flow_run.id, name=job_id)


def _remade(
    kind: type[Recipe] | None, template: str, store: Store, sites: list[str], warm_start: bool, fields: dict[str, Any]
) -> Recipe:
    """The recipe of a template, with the fields that this run changes.

    Raises:
        RecipeError: there is no such template, or what it would become cannot run.
    """
    try:
        recipe = recipe_of(template, store, kind).revise(**fields)
    except FileNotFoundError:
        raise _no_template(store, template) from None
    recipe.check_sites(sites)
    if warm_start and (model := last_model(recipe, store)) is not None:
        recipe = recipe.revise(model=model)
    return recipe
