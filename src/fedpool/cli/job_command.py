"""The command `fedpool job`: shows, verifies, replays, prunes, resumes and cancels jobs."""

import json
import runpy
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from fedpool.cli.job_report import print_job, print_jobs, print_replayed, print_verified
from fedpool.cli.which_server import meant_server
from fedpool.cli.which_store import meant_store
from fedpool.deployments import job_runs, stored_jobs
from fedpool.deployments.blocking import run_blocking
from fedpool.deployments.code_permission import permission
from fedpool.deployments.endings import read_endings
from fedpool.deployments.fate import with_client
from fedpool.deployments.handle import JobStatus
from fedpool.deployments.poc import DEFAULT_HOME
from fedpool.errors import ConfigError, ServerError
from fedpool.paths import JobPaths, new_job_id
from fedpool.recipe import Recipe
from fedpool.refusals import explained
from fedpool.store import Store
from fedpool.tasks.job_record import JobRecord

_CANCEL_LOOK_S = 3.0
"""How long `cancel` without --wait checks whether the job has ended."""
_CANCEL_WAIT_S = 120.0

job = App(name="job", help="Jobs, past and running.")

Home = Annotated[Path, Parameter(help="folder with logs, sites and store")]
StoreUrl = Annotated[
    str | None,
    Parameter(
        help="URL of the store; default: FEDPOOL_STORE, else that of the running proof of concept, else fedpool-runs"
    ),
]
AllowCode = Annotated[
    list[str] | None,
    Parameter(help="sha256 of the job's own code, to allow it to run here; repeatable", negative=""),
]
Json = Annotated[bool, Parameter(name="--json", help="print JSON", negative="")]


@job.command(name="list")
def list_(*, store: StoreUrl = None, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """List the jobs of a store, newest first."""
    found = stored_jobs.list_jobs(_store(store, home, quiet=as_json), partial(meant_server, home))
    if as_json:
        print(json.dumps([asdict(entry) for entry in found], indent=2))
        return
    if not found:
        print("it has no jobs")
        return
    print_jobs(found)


@job.command
def show(job_id: str, *, store: StoreUrl = None, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Show a job's rounds and models."""
    place = _store(store, home, quiet=as_json)
    summary, records, result = stored_jobs.read_job(place, job_id, partial(meant_server, home))
    described = JobRecord.read(place, JobPaths(job_id).job)
    if as_json:
        endings = {} if result is None else read_endings(place, job_id, result, records)
        rounds = [record.as_json() for record in records]
        said = None if result is None else result.as_json()
        print(json.dumps({**asdict(summary), "rounds": rounds, "result": said, "endings": endings}, indent=2))
        return
    print_job(place, summary, described, records, result)


@job.command
def verify(
    job_id: str,
    *,
    allow_code: AllowCode = None,
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Check every hash of a job, and recompute every aggregate from the stored updates. Exits
    with 1 at the first difference.
    """
    from fedpool.flows.verify import verify_job

    place = _store(store, home, quiet=as_json)
    stored_jobs.check_is_there(place, job_id)
    found = verify_job(place, job_id, allow=permission(allow_code))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    print_verified(job_id, found)


@job.command(name="logs")
def job_logs(
    job_id: str,
    *,
    at: Annotated[str | None, Parameter(name="--site", help="only the output of this site's script")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Print the logs of a job's runs, from the Prefect server."""
    with meant_server(home):
        for name, line in run_blocking(with_client(lambda client: job_runs.read_logs(client, job_id, at))):
            print(f"{name}: {line}")


@job.command
def cancel(
    job_id: str,
    *,
    wait: Annotated[bool, Parameter(help="wait until it has ended", negative="")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Ask a job to stop: its sites stop training, and it ends as cancelled. With --wait, exits
    with 1 if that takes too long.
    """
    with meant_server(home):
        run_id = run_blocking(with_client(lambda client: job_runs.cancel(client, job_id)))
        print(f"{job_id}: asked to stop", flush=True)
        timeout_s = _CANCEL_WAIT_S if wait else _CANCEL_LOOK_S
        ended = run_blocking(with_client(lambda client: job_runs.wait_until_over(client, run_id, timeout_s)))
    if ended is not None:
        print(f"{job_id}: {ended}")
    elif wait:
        raise ServerError(f"{job_id} has not stopped within {timeout_s:g} s: the coordinator's worker may be gone")
    else:
        print("it is stopping; --wait waits until it has stopped")


@job.command
def replay(
    job_id: str,
    *,
    at: Annotated[int | None, Parameter(name="--round", help="round; default: the last training round")] = None,
    strategy: Annotated[
        str | None,
        Parameter(
            help='another aggregator: its name, or JSON such as {"kind": "krum", "num_byzantine": 2}; default: the '
            "recipe's own strategy"
        ),
    ] = None,
    leave_out: Annotated[list[str] | None, Parameter(help="a site to leave out; repeatable")] = None,
    out: Annotated[Path | None, Parameter(help="safetensors file to write the model to")] = None,
    allow_code: AllowCode = None,
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Aggregate a round's updates again, with another strategy or without some sites. Doesn't
    change the job.
    """
    from fedpool.flows.replay import replay_round

    place = _store(store, home, quiet=as_json)
    stored_jobs.check_is_there(place, job_id)
    with explained(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="fedpool-") as scratch:
        target = out or Path(scratch) / "model.safetensors"
        found = replay_round(
            place,
            job_id,
            target,
            round=at,
            strategy=_aggregator(strategy),
            leave_out=leave_out or (),
            allow=permission(allow_code),
        )
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    print_replayed(job_id, found)


def _aggregator(text: str | None) -> "str | dict[str, Any] | None":
    """The value of `--strategy`: the name of an aggregator, or JSON."""
    if text is None or not text.startswith("{"):
        return text
    try:
        given: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f'--strategy {text} is not JSON ({error}): write {{"kind": "krum", "num_byzantine": 2}}, in single quotes'
        ) from None
    return given


@job.command
def prune(
    job_id: str,
    *,
    keep: Annotated[Literal["last", "none"], Parameter(help="keep the last round's updates, or none")] = "last",
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Remove the accepted updates of a job that has ended; models, records and hashes stay."""
    place = _store(store, home)
    freed = stored_jobs.prune(place, job_id, keep)
    print(f"{job_id}: {freed / 1e6:.1f} MB freed")


@job.command
def resume(
    job_id: str,
    *,
    fork: Annotated[bool, Parameter(help="instead, start a new job from a model of this one", negative="")] = False,
    from_round: Annotated[int | None, Parameter(help="round whose global model a fork starts from")] = None,
    allow_code: AllowCode = None,
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Resume a lost, failed or cancelled job from its last committed round. Exits with 1 if it
    fails.
    """
    from fedpool.deployments.prod import ProdEnv
    from fedpool.deployments.resumed import environment_of
    from fedpool.flows.stored import recipe_of

    place = _store(store, home)
    stored_jobs.check_is_there(place, job_id)
    described = JobRecord.read(place, JobPaths(job_id).job)
    recipe = recipe_of(job_id, place, allow=permission(allow_code))
    env = environment_of(described, place, home)
    with meant_server(home) if isinstance(env, ProdEnv) else nullcontext():
        run = recipe.execute(env, resume=job_id, fork=fork, from_round=from_round)
    print(f"{run.job_id}: {run.get_status()}")
    if run.get_status() is not JobStatus.COMPLETED:
        sys.exit(1)


@job.command(name="stage")
def stage_(
    source: Annotated[
        str, Parameter(help="FILE or FILE:NAME: a Python file, and the recipe's name in it (default: recipe)")
    ],
    *,
    sites: Annotated[list[str], Parameter(help="names of the sites")],
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write a recipe to the store as a deployment's template, and print its id, for
    prefect.yaml.
    """
    from fedpool.flows.own_code import check_travels
    from fedpool.flows.staging import stage

    path, _, name = source.partition(":")
    folder = str(Path(path).absolute().parent)
    sys.path.insert(0, folder)  # like `python FILE`
    try:
        found = runpy.run_path(path).get(name or "recipe")
    finally:
        sys.path.remove(folder)
    if not isinstance(found, Recipe):
        raise ConfigError(f"{path} has no recipe called {name or 'recipe'!r}: name it as FILE:NAME")
    found.check_sites(sites)
    check_travels(found)
    job_id = new_job_id(found.name)
    stage(found, job_id, _store(store, home, quiet=True), tuple(sites), template=True)
    print(job_id)


def _store(url: str | None, home: Path, *, quiet: bool = False) -> Store:
    """The store of a command; prints which one, on standard error if a program reads the output."""
    meant = meant_store(url, home)
    print(meant, file=sys.stderr if quiet else sys.stdout, flush=True)
    return meant.store
