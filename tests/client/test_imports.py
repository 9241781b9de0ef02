"""The cost of `import fedpool.client`: a script pays only for what it uses."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "prefect",
    "lightning",
    "pytorch_lightning",
    "transformers",
    "s3fs",
    "fsspec",
    "torch",
    "numpy",
    "pydantic",
    "rich",
    "httpx",
    "tensorboardX",
    "mlflow",
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=400)


@pytest.mark.parametrize("module", ["fedpool", "fedpool.client", "fedpool.client.tracking"])
def test_importing_it_loads_no_framework(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    assert json.loads(python("-c", code).stdout) == []


def test_initialising_and_running_standalone_loads_no_framework_either() -> None:
    code = (
        "import json, sys; import fedpool.client as flare\n"
        "flare.init()\nwhile flare.is_running():\n    flare.receive()\n    flare.send(flare.FLModel(metrics={'a': 1}))\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    assert json.loads(python("-c", code).stdout.splitlines()[-1]) == []


def test_importing_it_takes_less_than_a_fifth_of_a_second() -> None:
    # CPU time, and the best of five, because the machine may be busy with other things.
    code = "import time; start = time.process_time(); import fedpool.client; print(time.process_time() - start)"
    assert min(float(python("-c", code).stdout) for _ in range(5)) < 0.2
