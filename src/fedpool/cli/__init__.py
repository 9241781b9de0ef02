"""The `fedpool` command: `fedpool poc`, `coordinator`, `site`, `job`, `recipe` and `migrate`."""

import os
import sys
from collections.abc import Sequence

from cyclopts import App
from pydantic import ValidationError
from rich.console import Console

from fedpool.cli.coordinator_command import coordinator
from fedpool.cli.job_command import job
from fedpool.cli.migrate_command import migrate
from fedpool.cli.poc_command import poc
from fedpool.cli.recipe_command import recipe
from fedpool.cli.site_command import site
from fedpool.errors import FedpoolError
from fedpool.loopback import bypass_proxies
from fedpool.refusals import refusal

app = App(name="fedpool", help="Federated learning as Prefect flows.")
for command in (poc, coordinator, site, job, recipe, migrate):
    app.command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. A fedpool error is one line on standard error, with exit code 1."""
    bypass_proxies()
    try:
        try:
            app(arguments)
        finally:
            sys.stdout.flush()  # here, so that a closed pipe causes no traceback
    except BrokenPipeError:  # e.g. `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except FedpoolError as error:
        _complain(str(error))
    except ValidationError as error:
        if not error.title.endswith("Settings"):  # a bug in fedpool, not in the user's input: show the traceback
            raise
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        _complain(
            f"a Prefect setting is invalid ({error.title}): {problems}: "
            "correct the PREFECT_ variable or the profile that sets it"
        )
    except OSError as error:  # from a file, a disk or a connection: a problem of the machine, not a bug
        _complain(str(refusal(error, str(error.filename or "a file"), "written") or error))


def _complain(text: str) -> None:
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)
