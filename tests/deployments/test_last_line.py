"""How a job ends in a terminal: nothing follows our last line, and the process exits soon after."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

# Prints more than one log batch, and keeps printing after the last round.
TALKS = """
    import sys
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        for number in range(40):
            print("in the loop", number)
        if sys.argv[1:] == ["fail"] and model.current_round == 1:
            raise ValueError("my own error")
        flare.send(flare.FLModel(params=model.params))
    for number in range(40):
        print("after the loop", number)
"""

JOB = """
    import sys
    {imports}
    import numpy as np
    from fedpool import FedAvgRecipe, SimEnv

    recipe = FedAvgRecipe(name="ends", min_clients=2, num_rounds=2, model={{"w": np.zeros(3)}}, train_script="client.py",
                          train_args=sys.argv[1:])
    run = recipe.execute(SimEnv())
    print("the last line", flush=True)
"""


def run(folder: Path, *command: str, argument: str = "", imports: str = "") -> tuple[list[str], float]:
    """Run the job with a private server; returns its output lines, and how many seconds it lived
    after the last one.
    """
    (folder / "client.py").write_text(textwrap.dedent(TALKS))
    (folder / "job.py").write_text(textwrap.dedent(JOB.format(imports=imports)))
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    with subprocess.Popen(
        [*command, sys.executable, "job.py", *argument.split()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        assert job.stdout is not None
        lines, printed = [], time.monotonic()
        for line in job.stdout:
            lines.append(line.rstrip("\n"))
            printed = time.monotonic()
    assert job.returncode == 0, "\n".join(lines)
    return lines, time.monotonic() - printed


PINNED = ("taskset", "-c", "0", "nice", "-n", "19")


@pytest.mark.parametrize(
    ("command", "imports"),
    [
        ((), ""),
        pytest.param(PINNED, "import lightning", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
@pytest.mark.parametrize("argument", ["", "fail"])
def test_nothing_is_printed_after_our_last_line(
    argument: str, command: tuple[str, ...], imports: str, tmp_path: Path
) -> None:
    lines, lived_s = run(tmp_path, *command, argument=argument, imports=imports)
    assert lines[-1] == "the last line"
    if argument:
        error = [line for line in lines if not line.startswith("output of the scripts: ")][-2]
        assert error.endswith("ValueError: my own error")
    text = "\n".join(lines)
    for words in (
        "temporary server",
        "pending items",
        "items remaining",
        "Error logging to API",
        "connection attempts",
    ):
        assert words not in text
    assert lived_s < 30  # it was once two minutes; on an idle machine, it is a second
