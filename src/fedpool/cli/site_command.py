"""The command `fedpool site`: a data owner's worker, a single run, and registration at the
server.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console

from fedpool.deployments.blocking import run_blocking
from fedpool.errors import ServerError
from fedpool.sites.config import SiteConfig
from fedpool.sites.sandbox import WITHOUT, Sandboxing

site = App(name="site", help="A site: the data owner's side.")

SiteName = Annotated[str | None, Parameter(help="name of the site, as used in recipes")]
SiteFile = Annotated[Path | None, Parameter(help="TOML file with the site's settings")]
SiteData = Annotated[Path | None, Parameter(help="folder with the site's data: flare.get_config()['data']")]
SiteGpus = Annotated[str | None, Parameter(help='devices that scripts may use, e.g. "0,1"')]
SiteStore = Annotated[str | None, Parameter(help="URL of the only store that the site uses, e.g. s3://fl-jobs")]
SiteFolder = Annotated[Path | None, Parameter(help="the site's own folder, where scripts run")]
SiteSandbox = Annotated[
    Sandboxing | None,
    Parameter(help="how scripts are isolated; none: they may read and reach what the worker may"),
]


@site.command
def start(
    *,
    name: SiteName = None,
    config: SiteFile = None,
    pool: Annotated[str | None, Parameter(help="work pool to poll; default: the site's name")] = None,
    data: SiteData = None,
    gpus: SiteGpus = None,
    folder: SiteFolder = None,
    store: SiteStore = None,
    sandbox: SiteSandbox = None,
) -> None:
    """Start the site's worker; it runs until SIGTERM or Ctrl-C."""
    settings = _site_settings(config, data, sandbox, name=name, pool=pool, gpus=gpus, folder=folder, store=store)

    from prefect.settings import PREFECT_API_URL

    from fedpool.deployments.api import check_server
    from fedpool.deployments.site_worker import SiteWorker

    if not PREFECT_API_URL.value():
        check_server()
    worker = SiteWorker(settings.pool_name, config=settings)
    try:
        run_blocking(worker.start(printer=Console().print))
    except ServerError:
        check_server()  # the worker waits for a server that doesn't answer; this explains a refusal in one sentence
        raise
    except KeyboardInterrupt:  # before the worker installs its own handler
        Console().print(f"site {settings.name} has stopped")


@site.command
def run(
    *,
    name: SiteName = None,
    config: SiteFile = None,
    data: SiteData = None,
    gpus: SiteGpus = None,
    folder: SiteFolder = None,
    store: SiteStore = None,
    sandbox: SiteSandbox = None,
) -> None:
    """Do one round. This is the command that a process, docker or kubernetes pool's worker runs;
    see `fedpool site template`.
    """
    from fedpool.deployments.site_once import assigned_run, run_assigned

    def load() -> SiteConfig:
        return _site_settings(config, data, sandbox, name=name, gpus=gpus, folder=folder, store=store)

    if not run_assigned(assigned_run(), load):
        sys.exit(1)


@site.command
def template(
    *,
    kind: Annotated[Literal["process", "docker", "kubernetes"], Parameter(name="--type", help="type of the work pool")],
    name: Annotated[str, Parameter(help="name of the site, as used in recipes")],
    store: SiteStore = None,
    image: Annotated[str | None, Parameter(help="image with fedpool and the packages that scripts import")] = None,
    data: Annotated[
        str | None,
        Parameter(help="the site's data, read-only: a folder, for kubernetes a claim; flare.get_config()['data']"),
    ] = None,
    keep: Annotated[
        str | None,
        Parameter(help="storage for tensors that scripts keep between rounds: a folder, for kubernetes a claim"),
    ] = None,
    config: Annotated[
        str | None, Parameter(help="the site's TOML file; for kubernetes a secret with the key site.toml")
    ] = None,
    env: Annotated[
        list[str] | None, Parameter(help="NAME=VALUE, repeatable; not for secrets: the server shows the template")
    ] = None,
    env_secret: Annotated[str | None, Parameter(help="kubernetes secret with further variables")] = None,
    memory: Annotated[str | None, Parameter(help='limit, e.g. "4g", for kubernetes "4Gi"')] = None,
    cpus: Annotated[float | None, Parameter(help="limit, as a number of processors")] = None,
    namespace: Annotated[str | None, Parameter(help="kubernetes namespace; default: default")] = None,
    program: Annotated[str, Parameter(help="command that runs fedpool there")] = "fedpool",
    sandbox: Annotated[
        Sandboxing | None,
        Parameter(help="how scripts are isolated; default: none in a container, else the site's own setting"),
    ] = None,
) -> None:
    """Print the base job template of a site's work pool, in which a deployment can change
    nothing.
    """
    from fedpool.deployments.templates import base_job_template, parse_env

    found = base_job_template(
        kind,
        name=name,
        store=store,
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
        sandbox=sandbox,
    )
    print(json.dumps(found, indent=2))


@site.command
def policy(
    name: str,
    *,
    store: Annotated[str, Parameter(help="URL of the store, e.g. s3://fl-jobs")],
) -> None:
    """Print the S3 policy for the site's keys: they read jobs and write the site's own updates."""
    from fedpool.deployments.site_policy import site_policy

    print(json.dumps(site_policy(name, store), indent=2))


@site.command
def register(
    name: str,
    *,
    pool: Annotated[str, Parameter(help="work pool that runs the site's rounds")],
) -> None:
    """Register a site at the server whose rounds run in a process, docker or kubernetes pool."""

    async def register() -> None:
        from fedpool.deployments.api import open_client
        from fedpool.deployments.prefect_desk import register_site

        async with open_client() as client:
            await register_site(client, name, pool)

    run_blocking(register())


def _site_settings(file: Path | None, data: Path | None, sandbox: str | None, **given: Any) -> SiteConfig:
    if sandbox == "none":
        given["sandbox"] = WITHOUT
    elif sandbox is not None:
        given["sandbox"] = {"run": sandbox}
    settings = SiteConfig.load(file, **given)
    if data is None:
        return settings
    folder = data.absolute()
    changes: dict[str, Any] = {"config": {**settings.config, "data": str(folder)}}
    if settings.sandbox.run == "bubblewrap":
        changes["sandbox"] = settings.sandbox.model_copy(update={"read": (*settings.sandbox.read, folder)})
    return settings.model_copy(update=changes)
