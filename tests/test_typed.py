"""What a type checker sees of fedpool: mypy, strict, without pydantic's plugin, as in editors."""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from fedpool.flows.recipes import built_in

ROOT = Path(__file__).parents[1]

CACHE = ROOT / ".mypy_cache" / "of-a-user"
"""Not the cache of `make lint`, whose settings differ; it is kept, so that torch is read once."""

ASKED = """
reveal_type(recipe)
reveal_type(run)
reveal_type(result)
reveal_type(result.metrics)
recipe.execute(env="a simulation")
run.get_results()
"""

ENVIRONMENTS = """
import fedpool

fedpool.SimEnv()
fedpool.PocEnv(num_clients=2)
fedpool.ProdEnv(store="s3://bucket", sites=("a",))
"""


def block(name: str) -> str:
    """The README's first Python block for the file of this name."""
    found = re.search(rf"^```python\n(# {re.escape(name)}\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found is not None, f"the README shows no {name}"
    return found.group(1)


def every_recipe() -> str:
    """A script that builds each recipe with its required fields only."""
    values = {"name": "'a'", "min_clients": "1", "num_rounds": "1", "model": "{}", "train_script": "'client.py'"}
    lines = ["import fedpool"]
    for name, kind in built_in().items():
        needed = [field for field, info in kind.model_fields.items() if info.is_required()]
        given = ", ".join(f"{field}={values.get(field, '0.5')}" for field in needed)
        lines.append(f"fedpool.{name}({given})")
    return "\n".join(lines) + "\n"


def mypy(folder: Path, **modules: str) -> dict[str, list[str]]:
    """What mypy says about each module, line by line as "LINE: ...", with the settings of a user
    who has only asked for strictness.
    """
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(CACHE), *(f"{name}.py" for name in modules)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr + done.stdout
    return {
        name: [line.removeprefix(f"{name}.py:") for line in done.stdout.splitlines() if line.startswith(f"{name}.py:")]
        for name in modules
    }


def test_the_package_says_that_it_has_types() -> None:
    assert files("fedpool").joinpath("py.typed").is_file()


def test_recipes_environments_runs_and_results_have_their_types_and_a_misuse_is_refused(tmp_path: Path) -> None:
    job = block("job.py")
    said = mypy(tmp_path, job=job, recipes=every_recipe(), environments=ENVIRONMENTS, asked=job + ASKED)
    assert (said["job"], said["recipes"], said["environments"]) == ([], [], [])
    first = job.count("\n") + 2
    *revealed, wrong_type, wrong_name = said["asked"]
    assert revealed == [
        f'{first}: note: Revealed type is "fedpool.flows.fedavg.FedAvgRecipe"',
        f'{first + 1}: note: Revealed type is "fedpool.deployments.handle.Run"',
        f'{first + 2}: note: Revealed type is "fedpool.deployments.handle.Result"',
        f'{first + 3}: note: Revealed type is "list[dict[str, float]]"',
    ]
    assert wrong_type.startswith(
        f'{first + 4}: error: Argument "env" to "execute" of "Executable" has incompatible type "str"'
    )
    assert wrong_name.startswith(f'{first + 5}: error: "Run" has no attribute "get_results"')
