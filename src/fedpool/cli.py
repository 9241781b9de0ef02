"""The `fedpool` command: `fedpool poc`, `fedpool site`."""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from fedpool.deployments.poc import DEFAULT_HOME, PocEnv
from fedpool.errors import FedpoolError
from fedpool.sites.config import SiteConfig

app = App(name="fedpool", help="Federated learning as Prefect flows.")
poc = App(name="poc", help="A proof of concept on this machine: server, coordinator, sites.")
site = App(name="site", help="A site: the data owner's side.")
app.command(poc)
app.command(site)

Home = Annotated[Path, Parameter(help="folder of logs, sites and store")]


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
    env = PocEnv(num_clients=clients, store=store, s3=s3, database=database, home=home)
    env.up()
    _show(env)


@poc.command
def status(*, home: Home = DEFAULT_HOME) -> None:
    """Say what is up and healthy, and where the UI is; ends with 1 when something is not."""
    env = PocEnv(home=home)
    _show(env)
    if not all(service.healthy for service in env.status()):
        sys.exit(1)


@poc.command
def logs(
    name: Annotated[str, Parameter(help="server, s3, coordinator, or a site")], *, home: Home = DEFAULT_HOME
) -> None:
    """Print what a process has printed."""
    sys.stdout.write(PocEnv(home=home).log(name).read_text(errors="replace"))


@poc.command
def down(*, home: Home = DEFAULT_HOME) -> None:
    """End all of it; the results stay."""
    PocEnv(home=home).down()


@site.command
def start(
    *,
    name: Annotated[str | None, Parameter(help="name of the site, as recipes know it")] = None,
    config: Annotated[Path | None, Parameter(help="TOML file with the site's settings")] = None,
    pool: Annotated[str | None, Parameter(help="work pool to poll; default: the site's name")] = None,
    data: Annotated[Path | None, Parameter(help="folder of the site's data: flare.get_config()['data']")] = None,
    gpus: Annotated[str | None, Parameter(help='devices that scripts may use, e.g. "0,1"')] = None,
    folder: Annotated[Path | None, Parameter(help="the site's own folder, where scripts run")] = None,
) -> None:
    """Start the site's worker; it runs until SIGTERM or Ctrl-C."""
    settings = SiteConfig.load(config, name=name, pool=pool, gpus=gpus, folder=folder)
    if data is not None:
        settings = settings.model_copy(update={"config": {**settings.config, "data": str(data.absolute())}})

    from prefect.utilities.processutils import setup_signal_handlers_worker

    from fedpool.deployments.site_worker import SiteWorker

    setup_signal_handlers_worker(os.getpid(), "the site", Console().print)
    worker = SiteWorker(settings.pool_name, config=settings)
    try:
        asyncio.run(worker.start(printer=Console().print))
    except KeyboardInterrupt:  # what the first SIGTERM becomes
        Console().print(f"site {settings.name} has stopped")


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


def _show(env: PocEnv) -> None:
    console = Console()
    services = env.status()
    if not services:
        console.print(f"nothing is up in {env.home}", highlight=False)
        return
    table = Table()
    for header in ("process", "pid", "state", "log"):
        table.add_column(header, no_wrap=header != "log", overflow="fold")
    for service in services:
        state = "healthy" if service.healthy else "not healthy" if service.pid else "not running"
        table.add_row(service.name, str(service.pid or ""), state, str(service.log))
    console.print(table)
    console.print(
        f"UI: {env.ui_url}\nfor the prefect command: export PREFECT_API_URL={env.api_url}",
        highlight=False,
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error of ours is one line on standard error, and exit code 1."""
    try:
        app(arguments)
    except (FedpoolError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
