"""A custom tracker is one module of an installed package, named by an entry point."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import FedAvgRecipe, ProdEnv, Run, SimEnv
from fedpool.errors import RecipeError
from fedpool.tasks.track import Tracker, parse_tracker

WRITER = """
import json

from fedpool.tasks.tracker_process import Writer


class LinesWriter(Writer):
    def begin(self, target, job_id, name, params):
        self.path = target
        self.write(name=name)

    def scalars(self, run, rows):
        for name, value, step, when in rows:
            self.write(run=run, name=name, value=value, step=step)

    def end(self, status, texts):
        self.write(status=status)

    def write(self, **line):
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\\n")


def make_writer():
    return LinesWriter()
"""
SCRIPT = """
import fedpool.client as flare
from fedpool.client.tracking import SummaryWriter

flare.init()
while flare.is_running():
    model = flare.receive()
    SummaryWriter().add_scalar("loss", 0.5, global_step=model.current_round)
    flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.25}))
"""


FAULTY = {
    "acme_raises": "raise RuntimeError('no licence')",
    "acme_exits": "raise SystemExit('bye')",
    "acme_vanishes": "import os\nos._exit(0)",
    "acme_quits": "import os\ndef make_writer():\n    print('had enough', flush=True)\n    os._exit(0)",
    "acme_aborts": "import ctypes, os, faulthandler\nfaulthandler.enable()\nos.abort()",
}
"""Modules of trackers that end their process, and don't write anything."""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that registers the tracker "lines"."""
    site = tmp_path / "site-packages"
    about = site / "acme_lines-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "acme_lines.py").write_text(WRITER)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-lines\nVersion: 1.0\n")
    modules = {"lines": "acme_lines"} | {name.removeprefix("acme_"): name for name in FAULTY}
    for name, source in FAULTY.items():
        (site / f"{name}.py").write_text(source)
    lines = "".join(f"{kind} = {module}\n" for kind, module in modules.items())
    (about / "entry_points.txt").write_text("[fedpool.trackers]\n" + lines)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))


def test_it_gets_all_that_the_others_get(
    installed: None, run_job: Callable[..., Run], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = FedAvgRecipe(
        name="lined", min_clients=1, num_rounds=2, model={"w": np.zeros(2)}, train_script=write_script(SCRIPT)
    )
    env = SimEnv(
        num_clients=1, workspace=tmp_path / "runs", progress=False, track=[f"lines:{tmp_path / 'lines.jsonl'}"]
    )
    recipe.execute(env=env).get_result()
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert (lines[0], lines[-1]) == ({"name": "lined"}, {"status": "COMPLETED"})
    losses = [(line["step"], line["value"]) for line in lines if line.get("name") == "loss" and line["run"] == "site-1"]
    assert losses[:2] == [(0, 0.5), (1, 0.5)]
    assert {line["run"] for line in lines[1:-1]} == {"site-1", "server"}


def test_one_whose_process_ends_too_early_is_a_warning_with_its_name_and_the_cause(
    installed: None, run_job: Callable[..., Run], write_script: Callable[..., Path], tmp_path: Path, caplog: Any
) -> None:
    recipe = FedAvgRecipe(
        name="warned", min_clients=1, num_rounds=1, model={"w": np.zeros(2)}, train_script=write_script(SCRIPT)
    )
    kinds = [name.removeprefix("acme_") for name in FAULTY]
    env = SimEnv(num_clients=1, workspace=tmp_path / "runs", progress=False, track=kinds)
    recipe.execute(env=env).get_result()
    warned = {kind: [text for text in caplog.messages if text.startswith(f"tracker {kind}: ")] for kind in kinds}
    early = "before it had written everything"
    assert warned == {
        "raises": ["tracker raises: acme_raises cannot be used: RuntimeError: no licence"],
        "exits": ["tracker exits: acme_exits cannot be used: SystemExit: bye"],
        "vanishes": [f"tracker vanishes: its process ended with exit code 0 {early}, without a message"],
        "quits": [f"tracker quits: its process ended with exit code 0 {early}: had enough"],
        "aborts": [f"tracker aborts: its process was ended by SIGABRT {early}: Fatal Python error: Aborted"],
    }


def test_one_that_nobody_has_installed_is_refused_here_and_left_to_the_coordinator_elsewhere() -> None:
    with pytest.raises(RecipeError, match="install the package that registers it as an entry point of fedpool"):
        parse_tracker("lines:somewhere", here=True)
    tracker = parse_tracker("lines:somewhere", here=False)
    assert tracker == Tracker("lines", "somewhere")
    assert tracker.missing() == "no installed package registers a tracker 'lines'"
    assert ProdEnv(store="s3://x", sites=("a",), track=["lines:somewhere"]).track == ("lines:somewhere",)


@pytest.mark.parametrize("track", ["tensorbord", "", "no-name:x", "../x"])
def test_what_can_be_no_tracker_is_refused_everywhere(track: str) -> None:
    with pytest.raises(RecipeError, match="The tracker is unknown"):
        parse_tracker(track, here=False)
