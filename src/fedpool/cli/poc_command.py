"""The command `fedpool poc`: starts and stops a proof of concept."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.table import Table

from fedpool.deployments.poc import DEFAULT_HOME, PocEnv
from fedpool.deployments.poc_services import Service
from fedpool.deployments.terminal import open_console, ui_address

poc = App(name="poc", help="A proof of concept on this machine: server, coordinator, sites.")

Home = Annotated[Path, Parameter(help="folder with logs, sites and store")]


@poc.command
def up(
    *,
    clients: Annotated[int, Parameter(help="number of sites")] = 2,
    store: Annotated[str | None, Parameter(help="URL of the store; default: a folder in --home")] = None,
    s3: Annotated[bool, Parameter(help="start an S3 server and use it as the store", negative="")] = False,
    database: Annotated[str | None, Parameter(help="database URL; default: in memory")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Start the parts that aren't running, and wait until all of them answer."""
    proof = PocEnv(num_clients=clients, store=store, s3=s3, database=database, home=home)
    proof.up()
    _show(proof, proof.status())


@poc.command
def status(*, home: Home = DEFAULT_HOME) -> None:
    """Show which parts are up and healthy, and the address of the UI. Exits with 1 if a part
    isn't healthy or nothing is up.
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
    """Print a process's output."""
    sys.stdout.write(PocEnv(home=home).log(name).read_text(errors="replace"))


@poc.command
def env(*, home: Home = DEFAULT_HOME) -> None:
    """Print the variables that prefect and other programs need to reach it: eval "$(fedpool poc
    env)".
    """
    for name, value in PocEnv(home=home).environment().items():
        print(f"export {name}={shlex.quote(value)}")


@poc.command
def down(*, home: Home = DEFAULT_HOME) -> None:
    """Stop all parts; the results stay."""
    PocEnv(home=home).down()


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
    shown = ui_address(console, proof.access, "`fedpool poc env` has the password")
    console.print(f"UI: {shown}", highlight=False, markup=False, soft_wrap=True)
