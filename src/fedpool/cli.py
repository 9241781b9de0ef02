"""The `fedpool` command: `fedpool poc`, `fedpool site`, `fedpool job`, `fedpool recipe`,
`fedpool migrate`.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fedpool.deployments.blocking import run_blocking
from fedpool.deployments.job_command import job
from fedpool.deployments.migrate_command import migrate
from fedpool.deployments.poc import DEFAULT_HOME, PocEnv
from fedpool.deployments.poc_services import Service
from fedpool.deployments.recipe_command import recipe
from fedpool.deployments.terminal import open_console
from fedpool.errors import FedpoolError, ServerError
from fedpool.loopback import bypass_proxies
from fedpool.refusals import refusal
from fedpool.sites.config import SiteConfig

app = App(name="fedpool", help="Federated learning as Prefect flows.")
poc = App(name="poc", help="A proof of concept on this machine: server, coordinator, sites.")
site = App(name="site", help="A site: the data owner's side.")
app.command(poc)
app.command(site)
app.command(job)
app.command(recipe)
app.command(migrate)

Home = Annotated[Path, Parameter(help="folder of logs, sites and store")]
SiteName = Annotated[str | None, Parameter(help="name of the site, as recipes know it")]
SiteFile = Annotated[Path | None, Parameter(help="TOML file with the site's settings")]
SiteData = Annotated[Path | None, Parameter(help="folder of the site's data: flare.get_config()['data']")]
SiteGpus = Annotated[str | None, Parameter(help='devices that scripts may use, e.g. "0,1"')]
SiteFolder = Annotated[Path | None, Parameter(help="the site's own folder, where scripts run")]


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
    _show(proof, proof.status())


@poc.command
def status(*, home: Home = DEFAULT_HOME) -> None:
    """Say what is up and healthy, and where the UI is; ends with 1 when something is not, or
    nothing is.
    """
    proof = PocEnv(home=home)
    services = proof.status()
    _show(proof, services)
    if not services or not all(service.healthy for service in services):
        sys.exit(1)


@poc.command
def logs(
    name: Annotated[str, Parameter(help="server, s3, coordinator, or a site")], *, home: Home = DEFAULT_HOME
) -> None:
    """Print what a process has printed."""
    sys.stdout.write(PocEnv(home=home).log(name).read_text(errors="replace"))


@poc.command
def env(*, home: Home = DEFAULT_HOME) -> None:
    """Print the variables by which the prefect command and other programs reach it: eval
    "$(fedpool poc env)".
    """
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

    from prefect.settings import PREFECT_API_URL

    from fedpool.deployments.api import check_server
    from fedpool.deployments.site_worker import SiteWorker

    if not PREFECT_API_URL.value():
        check_server()
    worker = SiteWorker(settings.pool_name, config=settings)
    try:
        run_blocking(worker.start(printer=Console().print))
    except ServerError:
        check_server()  # a server that does not answer is waited for; one that refuses is told in a sentence
        raise
    except KeyboardInterrupt:  # before the worker takes the signal in its own way
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
    """Do one round: the command of a process, docker or kubernetes pool, whose worker starts it;
    see `fedpool site template`.
    """
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
    keep: Annotated[
        str | None,
        Parameter(help="where what scripts keep stays from round to round: a folder, for kubernetes a claim"),
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
    """Print the base job template of a site's work pool, which leaves nothing for a deployment
    to change.
    """
    from fedpool.deployments.templates import base_job_template, parse_env

    found = base_job_template(
        kind,
        name=name,
        image=image,
        data=data,
        keep=keep,
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
    """Tell the server of a site that has no worker of its own type, but a process, docker or
    kubernetes pool.
    """

    async def register() -> None:
        from fedpool.deployments.api import open_client
        from fedpool.deployments.prefect_desk import register_site

        async with open_client() as client:
            await register_site(client, name, pool)

    run_blocking(register())


def _site_settings(file: Path | None, data: Path | None, **given: Any) -> SiteConfig:
    settings = SiteConfig.load(file, **given)
    if data is not None:
        settings = settings.model_copy(update={"config": {**settings.config, "data": str(data.absolute())}})
    return settings


def _show(proof: PocEnv, services: Sequence[Service]) -> None:
    console = open_console()
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
    bypass_proxies()
    try:
        try:
            app(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no traceback
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except FedpoolError as error:
        _complain(str(error))
    except ValidationError as error:
        if not error.title.endswith("Settings"):  # nobody's input: a mistake of ours, whose traceback is wanted
            raise
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        _complain(
            f"a Prefect setting is invalid ({error.title}): {problems}: "
            "correct the PREFECT_ variable or the profile that sets it"
        )
    except OSError as error:  # of a file, a disk or a connection: what the machine refuses is no mistake of ours
        _complain(str(refusal(error, str(error.filename or "a file"), "written") or error))


def _complain(text: str) -> None:
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
