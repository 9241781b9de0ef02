"""The `fedpool` command: `fedpool poc`, `fedpool site`, `fedpool job`."""

import asyncio
import json
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from fedpool.deployments import jobs
from fedpool.deployments.poc import DEFAULT_HOME, PocEnv
from fedpool.deployments.run import JobStatus
from fedpool.errors import ConfigError, FedpoolError
from fedpool.paths import JobPaths, check_name, new_job_id
from fedpool.recipe import Recipe
from fedpool.sites.config import SiteConfig
from fedpool.store import Store
from fedpool.tasks.tables import report_rows

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

T = TypeVar("T")

app = App(name="fedpool", help="Federated learning as Prefect flows.")
poc = App(name="poc", help="A proof of concept on this machine: server, coordinator, sites.")
site = App(name="site", help="A site: the data owner's side.")
job = App(name="job", help="Jobs: what ran, what runs.")
app.command(poc)
app.command(site)
app.command(job)

Home = Annotated[Path, Parameter(help="folder of logs, sites and store")]
StoreUrl = Annotated[
    str | None, Parameter(help="URL of the store; default: that of the proof of concept that is up, else fedpool-runs")
]
SiteName = Annotated[str | None, Parameter(help="name of the site, as recipes know it")]
SiteFile = Annotated[Path | None, Parameter(help="TOML file with the site's settings")]
SiteData = Annotated[Path | None, Parameter(help="folder of the site's data: flare.get_config()['data']")]
SiteGpus = Annotated[str | None, Parameter(help='devices that scripts may use, e.g. "0,1"')]
SiteFolder = Annotated[Path | None, Parameter(help="the site's own folder, where scripts run")]
Json = Annotated[bool, Parameter(name="--json", help="print JSON", negative="")]


@poc.command
def up(
    *,
    clients: Annotated[int, Parameter(help="number of sites")] = 2,
    store: Annotated[str | None, Parameter(help="URL of the store; default: a folder in home")] = None,
    s3: Annotated[bool, Parameter(help="start an S3 server and use it as the store", negative="")] = False,
    database: Annotated[str | None, Parameter(help="database URL; default: in memory")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Start what does not run yet, and wait until all of it answers."""
    proof = PocEnv(num_clients=clients, store=store, s3=s3, database=database, home=home)
    proof.up()
    _show(proof)


@poc.command
def status(*, home: Home = DEFAULT_HOME) -> None:
    """Say what is up and healthy, and where the UI is; ends with 1 when something is not."""
    proof = PocEnv(home=home)
    _show(proof)
    if not all(service.healthy for service in proof.status()):
        sys.exit(1)


@poc.command
def logs(
    name: Annotated[str, Parameter(help="server, s3, coordinator, or a site")], *, home: Home = DEFAULT_HOME
) -> None:
    """Print what a process has printed."""
    sys.stdout.write(PocEnv(home=home).log(name).read_text(errors="replace"))


@poc.command
def env(*, home: Home = DEFAULT_HOME) -> None:
    """Print the variables by which the prefect command and other programs reach it: eval "$(fedpool poc env)"."""
    for name, value in PocEnv(home=home).environment().items():
        print(f"export {name}={shlex.quote(value)}")


@poc.command
def down(*, home: Home = DEFAULT_HOME) -> None:
    """End all of it; the results stay."""
    PocEnv(home=home).down()


@site.command
def start(
    *,
    name: SiteName = None,
    config: SiteFile = None,
    pool: Annotated[str | None, Parameter(help="work pool to poll; default: the site's name")] = None,
    data: SiteData = None,
    gpus: SiteGpus = None,
    folder: SiteFolder = None,
) -> None:
    """Start the site's worker; it runs until SIGTERM or Ctrl-C."""
    settings = _site_settings(config, data, name=name, pool=pool, gpus=gpus, folder=folder)

    from prefect.utilities.processutils import setup_signal_handlers_worker

    from fedpool.deployments.site_worker import SiteWorker

    setup_signal_handlers_worker(os.getpid(), "the site", Console().print)
    worker = SiteWorker(settings.pool_name, config=settings)
    try:
        asyncio.run(worker.start(printer=Console().print))
    except KeyboardInterrupt:  # what the first SIGTERM becomes
        Console().print(f"site {settings.name} has stopped")


@site.command
def run(
    *,
    name: SiteName = None,
    config: SiteFile = None,
    data: SiteData = None,
    gpus: SiteGpus = None,
    folder: SiteFolder = None,
) -> None:
    """Do one round: the command of a process, docker or kubernetes pool, whose worker starts it; see `fedpool site template`."""
    from fedpool.deployments.cold_site import assigned_run, run_assigned

    if not run_assigned(assigned_run(), lambda: _site_settings(config, data, name=name, gpus=gpus, folder=folder)):
        sys.exit(1)


@site.command
def template(
    *,
    kind: Annotated[Literal["process", "docker", "kubernetes"], Parameter(name="--type", help="type of the work pool")],
    name: Annotated[str, Parameter(help="name of the site, as recipes know it")],
    image: Annotated[str | None, Parameter(help="image with fedpool and what scripts import")] = None,
    data: Annotated[
        str | None,
        Parameter(help="the site's data, read-only: a folder, for kubernetes a claim; flare.get_config()['data']"),
    ] = None,
    config: Annotated[
        str | None, Parameter(help="the site's TOML file; for kubernetes a secret with the key site.toml")
    ] = None,
    env: Annotated[
        list[str] | None, Parameter(help="NAME=VALUE, can be repeated; no secrets: the server shows the template")
    ] = None,
    env_secret: Annotated[str | None, Parameter(help="kubernetes secret with further variables")] = None,
    memory: Annotated[str | None, Parameter(help='limit, e.g. "4g", for kubernetes "4Gi"')] = None,
    cpus: Annotated[float | None, Parameter(help="limit, in processors")] = None,
    namespace: Annotated[str | None, Parameter(help="kubernetes namespace; default: default")] = None,
    program: Annotated[str, Parameter(help="what runs fedpool there")] = "fedpool",
) -> None:
    """Print the base job template of a site's work pool, which leaves nothing for a deployment to change."""
    from fedpool.deployments.templates import base_job_template, parse_env

    found = base_job_template(
        kind,
        name=name,
        image=image,
        data=data,
        config=config,
        env=parse_env(env or ()),
        env_secret=env_secret,
        memory=memory,
        cpus=cpus,
        namespace=namespace,
        program=program,
    )
    print(json.dumps(found, indent=2))


@site.command
def register(
    name: str,
    *,
    pool: Annotated[str, Parameter(help="work pool that runs the site's rounds")],
) -> None:
    """Tell the server of a site that has no worker of its own type, but a process, docker or kubernetes pool."""

    async def register() -> None:
        from prefect.client.orchestration import get_client

        from fedpool.deployments.site_worker import register_site

        async with get_client() as client:
            await register_site(client, name, pool)

    asyncio.run(register())


@job.command(name="list")
def list_(*, store: StoreUrl = None, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """The jobs of a store, newest first."""
    found = jobs.list_jobs(_store(store, home))
    if as_json:
        print(json.dumps([_plain(entry) for entry in found], indent=2))
        return
    table = Table()
    for header in ("job", "recipe", "status", "rounds", "sites", "metrics"):
        table.add_column(header, no_wrap=header == "job")
    for entry in found:
        rounds = f"{entry.num_committed}/{entry.num_rounds}"
        table.add_row(
            entry.job_id, entry.recipe, _status(entry), rounds, str(len(entry.sites)), _metrics(entry.metrics)
        )
    Console().print(table)


@job.command
def show(job_id: str, *, store: StoreUrl = None, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """A job's rounds and models."""
    summary, records, result = jobs.read_job(_store(store, home), job_id)
    if as_json:
        print(json.dumps({**_plain(summary), "rounds": list(records), "result": result}, indent=2))
        return
    console = Console()
    console.print(f"{job_id}: {_status(summary)}", highlight=False)
    header, rows = report_rows(records)
    table = Table()
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if result is not None:
        if result["error"]:
            console.print(result["error"], style="red", markup=False, highlight=False, soft_wrap=True)
        for which in ("final", "best"):
            console.print(f"{which} model: {result[which]['path']}", highlight=False, soft_wrap=True)


@job.command
def verify(job_id: str, *, store: StoreUrl = None, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Check every hash of a job, and recompute every aggregate from the stored updates; ends with 1 at the first difference."""
    from fedpool.flows.verify import verify_job

    place = _store(store, home)
    jobs.read_job(place, job_id)  # says which jobs there are, if this one is not
    found = verify_job(place, job_id)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    print(
        f"{job_id}: {found.num_rounds} rounds and {found.num_updates} updates verified: "
        "every hash holds, and every aggregate comes out the same, to the byte"
    )
    if found.num_pruned:
        print(f"{found.num_pruned} updates were not kept: the aggregates of their rounds are taken on trust")
    if found.status is None:
        print("it has no result yet: it runs, or its coordinator was lost")


@job.command(name="logs")
def job_logs(
    job_id: str,
    *,
    at: Annotated[str | None, Parameter(name="--site", help="only what this site's script has printed")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """What a job's runs have logged, from the Prefect server."""
    with _server(home):
        for name, line in asyncio.run(_with_client(lambda client: jobs.read_logs(client, job_id, at))):
            print(f"{name}: {line}")


@job.command
def cancel(job_id: str, *, home: Home = DEFAULT_HOME) -> None:
    """Stop a job: its sites stop training, and it says that it was cancelled."""
    with _server(home):
        asyncio.run(_with_client(lambda client: jobs.cancel(client, job_id)))


@job.command
def replay(
    job_id: str,
    *,
    at: Annotated[int | None, Parameter(name="--round", help="round; default: the last training round")] = None,
    strategy: Annotated[str | None, Parameter(help="mean or median; default: the recipe's own")] = None,
    leave_out: Annotated[list[str] | None, Parameter(help="a site to do without; can be repeated")] = None,
    out: Annotated[Path | None, Parameter(help="safetensors file to write the model to")] = None,
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Aggregate a round's updates once more: by another strategy, or without some sites. The job stays as it is."""
    from fedpool.flows.replay import replay_round

    place = _store(store, home)
    jobs.read_job(place, job_id)  # says which jobs there are, if this one is not
    with tempfile.TemporaryDirectory(prefix="fedpool-") as scratch:
        target = out or Path(scratch) / "model.safetensors"
        found = replay_round(place, job_id, target, round=at, strategy=strategy, leave_out=leave_out or ())
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    print(f"round {found.round} of {job_id}, from {', '.join(found.sites)}: sha256 {found.sha256}")
    print(
        f"the round moved the model by {found.moved:.6g} (L2); this one lies {found.distance:.6g} from what was committed"
    )


@job.command
def prune(
    job_id: str,
    *,
    keep: Annotated[Literal["last", "none"], Parameter(help="whose updates stay: the last round's, or none")] = "last",
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Remove the accepted updates of a job that has ended; models, records and hashes stay."""
    place = _store(store, home)
    freed = jobs.prune(place, job_id, keep)
    print(f"{job_id}: {freed / 1e6:.1f} MB freed")


@job.command
def resume(
    job_id: str,
    *,
    fork: Annotated[bool, Parameter(help="make a new job from a model of this one instead", negative="")] = False,
    from_round: Annotated[int | None, Parameter(help="round whose global model a fork starts from")] = None,
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Go on with a job that was lost, has failed or was cancelled, from its last committed round; ends with 1 when it fails."""
    from fedpool.deployments.prod import ProdEnv
    from fedpool.deployments.sim import SimEnv
    from fedpool.flows.recipes import recipe_of

    place = _store(store, home)
    jobs.read_job(place, job_id)  # says which jobs there are, if this one is not
    described = place.read_json(JobPaths(job_id).job)
    recipe, sites = recipe_of(job_id, place), tuple(described["sites"])
    with _server(home) if not described["simulated"] else nullcontext():
        env = (
            SimEnv(clients=sites, workspace=Path(place.root))
            if described["simulated"]
            else ProdEnv(store=place.url, sites=sites)
        )
        run = recipe.execute(env, resume=job_id, fork=fork, from_round=from_round)
    print(f"{run.job_id}: {run.get_status()}")
    if run.get_status() is not JobStatus.COMPLETED:
        sys.exit(1)


@job.command(name="stage")
def stage_(
    source: Annotated[str, Parameter(help="FILE or FILE:NAME, a Python file and the recipe in it (default: recipe)")],
    *,
    sites: Annotated[list[str], Parameter(help="names of the sites")],
    store: StoreUrl = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write a recipe to the store as the template of a deployment, and print its id; for prefect.yaml."""
    from fedpool.flows.staging import stage

    path, _, name = source.partition(":")
    folder = str(Path(path).absolute().parent)
    sys.path.insert(0, folder)  # as `python FILE` would
    try:
        found = runpy.run_path(path).get(name or "recipe")
    finally:
        sys.path.remove(folder)
    if not isinstance(found, Recipe):
        raise ConfigError(f"{path} has no recipe called {name or 'recipe'!r}: name it as FILE:NAME")
    found.check_sites([check_name("site", name) for name in sites])
    job_id = new_job_id(found.name)
    stage(found, job_id, _store(store, home), tuple(sites), template=True)
    print(job_id)


def _site_settings(file: Path | None, data: Path | None, **given: Any) -> SiteConfig:
    settings = SiteConfig.load(file, **given)
    if data is not None:
        settings = settings.model_copy(update={"config": {**settings.config, "data": str(data.absolute())}})
    return settings


def _store(url: str | None, home: Path) -> Store:
    if url is not None:
        return Store(url)
    proof = PocEnv(home=home)
    return proof.open_store() if proof.is_up() else Store(Path("fedpool-runs").absolute())


@contextmanager
def _server(home: Path) -> Iterator[None]:
    """The server of the proof of concept that is up, unless one is configured."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    with temporary_settings({PREFECT_API_URL: PocEnv(home=home).api_url}):
        yield


async def _with_client(use: Callable[["PrefectClient"], Awaitable[T]]) -> T:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        return await use(client)


def _status(summary: jobs.JobSummary) -> str:
    return summary.status or "not ended"


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _plain(summary: jobs.JobSummary) -> dict[str, Any]:
    return asdict(summary)


def _show(proof: PocEnv) -> None:
    console = Console()
    services = proof.status()
    if not services:
        console.print(f"nothing is up in {proof.home}", highlight=False)
        return
    table = Table()
    for header in ("process", "pid", "state", "log"):
        table.add_column(header, no_wrap=header != "log", overflow="fold")
    for service in services:
        state = "healthy" if service.healthy else "not healthy" if service.pid else "not running"
        table.add_row(service.name, str(service.pid or ""), state, str(service.log))
    console.print(table)
    console.print(f"UI: {proof.ui_url}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error of ours is one line on standard error, and exit code 1."""
    try:
        app(arguments)
    except (FedpoolError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
