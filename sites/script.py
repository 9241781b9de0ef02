"""Runs a client script, in the same way everywhere, from a fresh process to its first line.

The zygote uses this in a forked child. Elsewhere a site runs `python -m fedpool.sites.script
REQUEST`, where REQUEST is a JSON object with the arguments of `run_script`; `torchrun ... -m
fedpool.sites.script REQUEST` works the same.
"""

import importlib
import json
import os
import resource
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from fedpool.startup import collector_off

_ALWAYS = ("fedpool.client.tracking", "safetensors")
"""Modules that every client script imports sooner or later."""


def preload(imports: Sequence[str]) -> dict[str, str]:
    """Import the modules outside its bundle that a script imports, before generators are seeded.

    Args:
        imports: dotted names. `a.b`, from `from a import b`, may be a module or any other object.

    Returns: name -> error, for failed imports. The script will raise the error itself.
    """
    failed: dict[str, str] = {}
    with collector_off():
        for name in (*_ALWAYS, *imports):
            package, _, attribute = name.rpartition(".")
            try:
                __import__(package or name, fromlist=[attribute] if package else ())
            except BaseException as error:  # noqa: BLE001  # imports run any code; the script will raise the error itself
                failed[name] = f"{type(error).__name__}: {error}"
        if "torch" in sys.modules:
            _rehearse()
    importlib.invalidate_caches()
    return failed


def _rehearse() -> None:
    """Run what torch postpones until a script makes and seeds an optimizer: 800 imports, 2 s.

    Nothing else: starting threads or looking for devices would break the scripts that are forked
    from here.
    """
    import torch

    importlib.import_module("safetensors.torch")
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).zero_grad()
    torch.manual_seed(0)


class _SeedOnImport(MetaPathFinder):
    """Seeds numpy and torch when the script is the first to import them, as `run_script` would."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in ("numpy", "torch") else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_seed(module: ModuleType) -> None:
            from fedpool.client.seeding import seed_library

            execute(module)
            seed_library(fullname, self._seed)

        spec.loader.exec_module = execute_and_seed  # type: ignore[method-assign]
        return spec


def run_script(script: str, arguments: Sequence[str], *, threads: int, seed: int) -> int:
    """Run a script as `python script.py ARGUMENTS` would; returns its exit code.

    Args:
        script: its path; its folder replaces the first entry of `sys.path`.
        threads: number of torch threads.
        seed: seed of the script's random generators.
    """
    from fedpool.client.seeding import seed_everything

    sys.meta_path.insert(0, _SeedOnImport(seed))
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    seed_everything(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  # as at the end of an interpreter: print the error
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != script:
            trace = trace.tb_next  # skip our own frames and runpy's
        traceback.print_exception(type(error), error, trace or error.__traceback__)
        return 1
    return 0


def _limit(limits: Mapping[str, int]) -> None:
    """Set resource limits of this process and of what it starts, for good; `limits` has their names
    without `RLIMIT_`. A lower limit that exists already stays.
    """
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(number)
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (lowest, lowest))


def main() -> None:
    """Entry point of a script's own process."""
    request = json.loads(sys.argv[1])
    _limit(request["limits"])
    # The current folder was kept off the path until here. The Python processes that the script
    # itself starts find the modules beside them, as usual.
    os.environ.pop("PYTHONSAFEPATH", None)
    sys.path.insert(0, request["beside"] or str(Path(request["script"]).parent))
    preload(request["imports"])
    os.chdir(request["folder"])
    sys.exit(run_script(request["script"], request["arguments"], threads=request["threads"], seed=request["seed"]))


if __name__ == "__main__":
    main()
