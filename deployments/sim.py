"""`SimEnv`: simulation on this machine, with sites as sessions in local slots.

This module does not import Prefect before the job's thread does, so that a private server can start
meanwhile.
"""

import asyncio
import atexit
import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator
from rich.console import Console

from fedpool.deployments.handle import Run
from fedpool.deployments.progress import show
from fedpool.deployments.sim_api import find_api
from fedpool.deployments.terminal import open_console
from fedpool.deployments.tracked import Tracked
from fedpool.deployments.virtual import VirtualTime
from fedpool.environment import ANEW, Begin
from fedpool.errors import RecipeError
from fedpool.flows.own_code import check_strategy, code_of, why_it_stays
from fedpool.flows.staging import Start, check_unchanged, has_completed, start_of
from fedpool.loopback import bypass_proxies
from fedpool.paths import JobPaths, check_folder
from fedpool.recipe import Recipe
from fedpool.sites.devices import missing_device
from fedpool.sites.handles import allow_scripts
from fedpool.sites.local import LocalSites, default_slots
from fedpool.sites.script_process import find_program
from fedpool.startup import collector_off
from fedpool.store import Store
from fedpool.tasks.job_record import EnvironmentRecord
from fedpool.tasks.prefect_internals import drain, quiet_console

_DRAIN_TIMEOUT_S = 30.0


class SimEnv(Tracked, VirtualTime):
    """Simulation on this machine.

    If no Prefect API is configured, a private server with an in-memory database runs as long as the
    job. Every script runs in the folder from which `execute` is called, as with `python client.py`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_clients: int | None = Field(
        default=None, description="number of sites, named site-1, site-2, ...", ge=1, le=100_000
    )
    num_threads: int | None = Field(
        default=None,
        description="number of sites that train at once; default: one per device, or per processor without devices",
        ge=1,
        le=1024,
    )
    gpus: str | None = Field(
        default=None, description='devices assigned to the slots in turn, e.g. "0,1"; default: all that scripts find'
    )
    workspace: Path = Field(default=Path("fedpool-runs"), description="folder for the jobs' folders")
    keep_alive: bool = Field(
        default=True,
        description="keep each site's script running between rounds; False: a new one each round, for thousands of sites",
    )
    command: str | dict[str, str] = Field(
        default="python",
        description='command that runs the client script: "python", e.g. "torchrun --nproc-per-node 2", or site -> command',
    )
    logs: Literal["file", "console"] = Field(
        default="file",
        description='"console": also show the output of scripts in the terminal; it is always in logs/ in the job\'s folder',
    )
    progress: bool = Field(default=True, description="show progress and a summary in the terminal")

    @field_validator("gpus")
    @classmethod
    def _devices_are_numbers(cls, value: str | None) -> str | None:
        if value is not None and not all(part.strip().isdigit() for part in value.split(",")):
            raise RecipeError(f'gpus={value!r} is not a list of device numbers: write them as "0,1"')
        if value is not None and (wrong := missing_device(value)) is not None:
            raise RecipeError(wrong)
        return value

    @field_validator("workspace")
    @classmethod
    def _workspace_can_be_made(cls, value: Path) -> Path:
        return check_folder("workspace", value)

    @field_validator("command")
    @classmethod
    def _commands_can_run(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        for command in [value] if isinstance(value, str) else value.values():
            program = find_program(command)[0]
            if shutil.which(program) is None:
                raise RecipeError(f"command {command!r}: there is no program {program!r} on this machine's PATH")
        return value

    def commands(self, names: Sequence[str]) -> dict[str, str]:
        """The commands of sites with another command than "python", whose scripts are not forked.

        Raises:
            RecipeError: a command is given for a site that does not exist.
        """
        commands = dict.fromkeys(names, self.command) if isinstance(self.command, str) else self.command
        if unknown := sorted(set(commands) - set(names)):
            raise RecipeError(f"command names {', '.join(unknown)}, but the sites are {', '.join(names)}")
        return {site: command for site, command in commands.items() if command != "python"}

    def recorded(self, virtual: Mapping[str, Any] | None = None) -> EnvironmentRecord:
        """The record for `job.json`, with which `fedpool job resume` continues, plus `virtual`."""
        own = self.model_dump(mode="json", include={"num_threads", "gpus", "keep_alive", "command", "logs"})
        return EnvironmentRecord(type="SimEnv", settings=own | self.tracking() | dict(virtual or {}))

    def site_names(self, recipe: Recipe) -> tuple[str, ...]:
        """Names of the sites for a recipe; as many as it needs if the environment does not say."""
        return self.names_or(recipe.sample_size or recipe.min_clients)

    def execute(self, recipe: Recipe, begin: Begin = ANEW, *, wait: bool = True) -> Run:
        """Run a recipe.

        Args:
            recipe: the recipe to run.
            begin: how the job begins.
            wait: show the job's progress and return when it has ended. If False, return at once;
                the job runs on its own thread.

        Returns: a handle on the job. If the job fails, the handle reports that (`get_status`,
        `get_result`); nothing is raised here.

        Raises:
            RecipeError: recipe and environment do not match.
            ConfigError: this machine allows too few open files for so many running scripts.
            ServerError, StoreError: the job could not begin.
            KeyboardInterrupt: Ctrl-C; the sessions are ended first, and the job ends as cancelled.
        """
        bypass_proxies()
        store = Store(self.workspace.absolute())
        start = start_of(recipe, store, begin)
        recipe, job_id = start.recipe, start.job_id
        names = self.site_names(recipe)
        recipe.check_sites(names)
        check_strategy(recipe, len(names))
        commands, environment = self.commands(names), self.recorded(self.virtual(recipe, names))
        if start.resumes:
            check_unchanged(recipe, job_id, store, names)
            if has_completed(store, job_id):
                return Run(job_id, store, work=lambda: None, cancel=lambda: None)
        code_of(recipe)  # refuses now what the job could not store
        gpus = [part.strip() for part in self.gpus.split(",")] if self.gpus else []
        num_slots = min(self.num_threads or default_slots(len(names), gpus), len(names))
        num_live = len(names) if self.keep_alive else num_slots
        allow_scripts(
            min(num_live, recipe.sample_size or num_live),
            num_live,
            remedy="use keep_alive=False and a smaller num_threads",
        )
        console = open_console(quiet=not self.progress)
        for note in recipe.bundle.notes:
            console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
        if why := why_it_stays(recipe):
            console.print(
                f"{why}. Until then its jobs run only here, and the fedpool command cannot verify, replay or resume them",
                style="yellow",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        sites = LocalSites(
            names,
            num_slots=num_slots,
            threads=recipe.threads_per_site,
            keep_alive=self.keep_alive,
            gpus=gpus,
            workspace=self.workspace.absolute(),
            workdir=Path.cwd(),
            imports=recipe.bundle.imports,
            origin=_origin(Path(recipe.train_script)),
            commands=commands,
            show=_show_on(open_console() if console.quiet else console) if self.logs == "console" else None,
        )
        run = Run(
            job_id,
            store,
            work=lambda: _work(start, store, sites, console, environment, self.track),
            cancel=sites.cancel,
        )
        if wait:
            show(run, recipe, len(names), console)
            console.print(f"output of the scripts: {run.path}/logs", highlight=False, markup=False, soft_wrap=True)
        return run


def _show_on(console: Console) -> Callable[[str, str], None]:
    """A function that shows output of the sites' scripts in a terminal, above the progress line."""

    def show_line(site: str, line: str) -> None:
        console.print(f"{site} | {line}", highlight=False, markup=False, soft_wrap=True)

    return show_line


def _origin(script: Path) -> str:
    """Folder of a script; empty if the script no longer exists, as for a resumed job."""
    return str(script.resolve().parent) if script.is_file() else ""


def _work(
    start: Start,
    store: Store,
    sites: LocalSites,
    console: Console,
    environment: EnvironmentRecord,
    track: Sequence[str],
) -> None:
    """Run a job to its end, on its own thread and event loop."""
    # When the interpreter exits, searching all objects of torch and Prefect for garbage would take
    # longer than some rounds.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    with ExitStack() as stack:
        stack.callback(sites.close)
        with collector_off():
            api = find_api(stack, console, sites)

        from prefect.settings import temporary_settings

        from fedpool.flows.job import federated_job
        from fedpool.tasks.report.prefect_ui import Reporter
        from fedpool.tasks.tracking import trackings

        stack.enter_context(temporary_settings(api))
        stack.enter_context(quiet_console())  # the progress line is shown instead
        # Before the server ends, its clients in this process must send their pending data.
        stack.callback(drain, _DRAIN_TIMEOUT_S)

        async def run_job() -> None:
            state = await federated_job(
                start.recipe,
                start.job_id,
                store.url,
                sites,
                start.resumes,
                start.parent,
                environment,
                (Reporter(), *trackings(track)),
                return_state=True,
            )
            if not store.exists(JobPaths(start.job_id).result):  # otherwise the result has the error
                await state.aresult()

        asyncio.run(run_job())
