"""Run the client scripts of NVFlare's examples after `fedpool migrate`, with no other changes, and
print the outcome of each.

::

    git clone https://github.com/NVIDIA/NVFlare
    pip install datasets opacus pandas tensorboard torch_geometric trl
    python benchmarks/nvflare_scripts.py NVFlare

Copies are migrated in a scratch folder, and each runs in `SimEnv` with two sites and two rounds.
The initial model is the one that the script has when it runs alone, or one small array if it uses
only NumPy. Images are generated: `synthetic/` has a stand-in for torchvision. A script that takes
its data or its model by arguments gets tiny ones (`nvflare_cases.py`). A script that can't run here
is listed with the reason. Keep the checkout out of /tmp/nvflare, because some of the scripts write
there.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nvflare_cases import NUM_SITES, case_of, kind_of, note, reason_of

FOLDERS = ("examples", "integration", "research", "skills", "tests/integration_test/data", "docs")
SYNTHETIC = Path(__file__).parent / "synthetic"
TIMEOUT_S = 600


_CONFIGS = {"fedprox": {"fedprox_mu": 0.1}, "scaffold": {"algorithm": "scaffold"}, "": {}}
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Settings:
    """How to run one script.

    Attributes:
        model: "numpy", one array with a known name; "alone", the model that the script sends when
            it runs alone; or an expression of `Case`.
        algorithm: "scaffold", "fedprox" or "".
        python_path: the folders with its modules, in addition to its own.
    """

    script: Path
    data: Path
    arguments: str
    model: str
    algorithm: str
    cross_site_eval: bool
    python_path: str
    images: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """A script and its outcome: `ran`, `left` (something to do by hand), `failed`, or `not run`."""

    path: str
    kind: str
    outcome: str
    detail: str = ""


def main() -> None:
    """Run all matching scripts, print a line for each and a table, and exit with 1 if one
    failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of NVFlare's repository")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of paths in it, in the order to run")
    parser.add_argument("--json", type=Path, help="also write the outcomes to this file, as they become known")
    parser.add_argument(
        "--resume", action="store_true", help="skip the scripts that have run according to the file of --json"
    )
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json FILE")
    found = []
    before = _outcomes(arguments.json) if arguments.resume else {}
    _CONTEXT.set_forkserver_preload(["fedpool.deployments.sim", "fedpool.flows.job", "torch", "prefect.flow_engine"])
    with _server(), tempfile.TemporaryDirectory(prefix="fedpool-nvflare-") as scratch:
        for number, path in enumerate(_scripts(arguments.checkout, arguments.only)):
            found.append(before.get(path) or _check(arguments.checkout, path, Path(scratch) / str(number)))
            note(f"{found[-1].outcome:8} {path} {found[-1].detail}")
            if arguments.json:
                known = before | {each.path: each for each in found}
                arguments.json.write_text(json.dumps([vars(each) for each in known.values()], indent=1) + "\n")
    for line in _table(found):
        print(line)
    sys.exit(any(each.outcome == "failed" for each in found))


def _scripts(checkout: Path, patterns: Sequence[str]) -> Iterator[str]:
    """The client scripts: those that import NVFlare's client and take part in rounds, in the
    order of the patterns.
    """
    paths = list(_client_scripts(checkout))
    for pattern, *earlier in (patterns[number::-1] for number in range(len(patterns))):
        for path in paths:
            if fnmatch(path, pattern) and not any(fnmatch(path, each) for each in earlier):
                yield path


def _client_scripts(checkout: Path) -> Iterator[str]:
    for folder in FOLDERS:
        for file in sorted((checkout / folder).rglob("*.py")):
            path = file.relative_to(checkout).as_posix()
            text = file.read_text(errors="replace")
            loops = re.search(r"\b(is_running|receive|patch)\(", text)
            if "nvflare.client" in text and loops and "nvflare.recipe" not in text:
                yield path


def _outcomes(file: Path) -> dict[str, Found]:
    """The scripts that ran according to an earlier file of outcomes."""
    found = [Found(**fields) for fields in json.loads(file.read_text())] if file.exists() else []
    return {each.path: each for each in found if each.outcome == "ran"}


def _check(checkout: Path, path: str, scratch: Path) -> Found:
    original = checkout / path
    text = original.read_text()
    modules = _imported(text)
    kind = kind_of(modules, text)
    case = case_of(path)
    folders = [original.parent, *(checkout / folder for folder in case.beside)]
    missing = [name for name in sorted(modules) if not _there(name, folders)]
    if reason := reason_of(path, text, modules, missing):
        return Found(path, kind, "not run", reason)
    for number, folder in enumerate(folders):
        shutil.copytree(folder, scratch / str(number), ignore=shutil.ignore_patterns("*.ipynb", "*.png", "*.gz"))
    left = _migrate(scratch)
    script = scratch / "0" / original.name
    mine = [line.removeprefix(f"{script}:") for line in left if re.match(rf"{re.escape(str(script))}:\d", line)]
    named = "".join(f"line {line}; " for line in mine).removesuffix("; ")
    if any("init(config_file=)" not in line for line in mine):
        return Found(path, kind, "left", named)
    data = scratch / "data"
    data.mkdir()
    if case.prepare:
        case.prepare(data)
    stand_in = [] if kind == "Hugging Face" else [SYNTHETIC]  # transformers uses much more of torchvision
    own = os.pathsep.join(map(str, [*stand_in, *(scratch / str(n) for n in range(1, len(folders)))]))
    settings = Settings(
        script,
        data,
        case.arguments.format(data=data),
        case.model or ("numpy" if kind == "NumPy" or _by_one_array(text) else "alone"),
        "scaffold" if "SCAFFOLD_CTRL" in text else "fedprox" if "get_fedprox_mu" in text else "",
        "is_submit_model" in text,
        own,
        case.images,
        case.shape,
    )
    before = {"numpy": (), "alone": (_alone,)}.get(settings.model, (_built,))
    for target in (*before, _run_job):
        if error := _in_a_process(target, settings):
            return Found(path, kind, "failed", f"{target.__name__.strip('_')}: {error}")
    return Found(path, kind, "ran", named)


def _by_one_array(text: str) -> bool:
    """Whether a script uses the name of the one array that NVFlare's NumPy recipes exchange."""
    return "NUMPY_KEY" in text or '"numpy_key"' in text


def _in_a_process(target: Callable[["Settings"], None], settings: "Settings") -> str:
    """Call a function in a process that has imported the slow modules; returns the error, or ""
    on success.
    """
    log = settings.data / f"{target.__name__}.log"
    process = _CONTEXT.Process(target=_logged, args=(log, target, settings))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.terminate()
        process.join()
        return f"took more than {TIMEOUT_S} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "" if process.exitcode == 0 else (lines[-1][:400] if lines else f"exit code {process.exitcode}")


def _logged(log: Path, target: Callable[["Settings"], None], settings: "Settings") -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["PYTHONPATH"] = settings.python_path + os.pathsep + os.environ.get("PYTHONPATH", "")
    if settings.images:
        os.environ["SYNTHETIC_IMAGES"] = str(settings.images)
    os.chdir(settings.script.parent)
    target(settings)
    sys.stdout.flush()


def _alone(settings: "Settings") -> None:
    """Run a script alone until it loads the received model or sends, and keep its model at that
    point.
    """
    import torch

    from fedpool.arrays import save_arrays
    from fedpool.client import hosts

    target = settings.data / "alone"
    first, load = hosts.Standalone.next, torch.nn.Module.load_state_dict

    def next_kept(self: hosts.Standalone, timeout: float | None) -> Any:
        self.welcome = dataclasses.replace(self.welcome, config=_CONFIGS[settings.algorithm])
        assignment = first(self, timeout)
        return assignment and dataclasses.replace(assignment, update=str(target))

    def load_kept(self: torch.nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if type(state_dict).__name__ == "InitialParams":  # a script that runs alone receives these
            with target.open("wb") as file:
                save_arrays(file, self.state_dict())
            os._exit(0)
        return load(self, state_dict, *args, **kwargs)

    # This process only runs this script.
    hosts.Standalone.next = next_kept  # type: ignore[method-assign]
    torch.nn.Module.load_state_dict = load_kept  # type: ignore[method-assign]
    torch.nn.Module.load_state_dict.wrapped_by_fedpool = True  # type: ignore[attr-defined]
    sys.argv = [str(settings.script), *settings.arguments.split()]
    sys.path[:0] = [str(settings.script.parent), *settings.python_path.split(os.pathsep)]
    runpy.run_path(str(settings.script), run_name="__main__")


def _built(settings: "Settings") -> None:
    """Keep the model that an expression in one of the script's modules gives."""
    from fedpool.arrays import save_arrays

    sys.path[:0] = [str(settings.script.parent), *settings.python_path.split(os.pathsep)]
    module, _, expression = settings.model.partition(":")
    model = eval(expression, vars(importlib.import_module(module)))
    with (settings.data / "alone").open("wb") as file:
        save_arrays(file, model.state_dict())


def _imported(text: str) -> set[str]:
    """The packages that a script imports, without the standard library and NVFlare."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"nvflare"}


def _there(name: str, folders: list[Path]) -> bool:
    places = [*folders, SYNTHETIC]
    if any((folder / f"{name}.py").exists() or (folder / name).is_dir() for folder in places):
        return True
    return importlib.util.find_spec(name) is not None


def _migrate(folder: Path) -> list[str]:
    """Run `fedpool migrate` on a folder; returns its lines about the changes left to do."""
    from fedpool.cli.migrate_command import migrate

    with contextlib.redirect_stdout(io.StringIO()) as output:
        migrate(folder)
    return output.getvalue().splitlines()


@contextlib.contextmanager
def _server() -> Iterator[None]:
    """One Prefect server for all jobs, set in the environment of all further processes."""
    from fedpool.deployments.server import private_server

    with private_server() as server:
        server.wait()
        os.environ |= server.access.environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        yield


def _run_job(settings: "Settings") -> None:
    """Run the job, and check that every site's update was accepted in both rounds."""
    import numpy as np

    from fedpool import FedAvgRecipe, FedProxRecipe, ScaffoldRecipe, SimEnv
    from fedpool.arrays import load_arrays

    kinds = {"scaffold": ScaffoldRecipe, "fedprox": FedProxRecipe, "": FedAvgRecipe}
    array = {"numpy_key": np.arange(math.prod(settings.shape), dtype=np.float32).reshape(settings.shape)}
    model = array if settings.model == "numpy" else load_arrays(settings.data / "alone", "torch")
    recipe = kinds[settings.algorithm](
        name="check",
        min_clients=NUM_SITES,
        num_rounds=2,
        model=model or array,  # a script that sends back the received model has none of its own
        train_script=settings.script,
        train_args=settings.arguments,
        cross_site_eval=settings.cross_site_eval,
        round_timeout=TIMEOUT_S / 2,
        **(_CONFIGS["fedprox"] if settings.algorithm == "fedprox" else {}),
    )
    env = SimEnv(num_clients=NUM_SITES, workspace=settings.data / "runs", progress=False)
    result = recipe.execute(env=env).get_result()
    accepted = [len(each["accepted"]) for each in result.rounds[:2]]
    if accepted != [NUM_SITES] * 2:
        sys.exit(f"accepted updates of the two rounds: {accepted}, not {NUM_SITES} each")


def _table(found: list[Found]) -> Iterator[str]:
    """Outcomes by kind, as Markdown; then the details of each script."""
    outcomes = ("ran", "left", "failed", "not run")
    yield f"| kind | scripts | {' | '.join(outcomes)} |"
    yield "|---|" + "---:|" * (len(outcomes) + 1)
    for kind in sorted({each.kind for each in found}):
        counts = Counter(each.outcome for each in found if each.kind == kind)
        yield f"| {kind} | {counts.total()} | {' | '.join(str(counts[outcome]) for outcome in outcomes)} |"
    yield ""
    for each in found:
        if each.detail:
            yield f"{each.outcome}: {each.path}: {each.detail}"


if __name__ == "__main__":
    main()
