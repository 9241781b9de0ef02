"""The values that `track` accepts, checked before anything runs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpool import PocEnv, ProdEnv, RecipeError, SimEnv
from fedpool.deployments.resumed import environment_of
from fedpool.store import Store
from fedpool.tasks.track import Tracker, check_places, parse_tracker
from tests.records import job_of


def test_a_tracker_has_a_kind_and_where_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_tracker("tensorboard", here=True) == Tracker("tensorboard")
    assert parse_tracker("tensorboard:logs", here=True) == Tracker("tensorboard", str(tmp_path / "logs"))
    assert parse_tracker("mlflow:http://host:5000", here=True).target == "http://host:5000"
    assert parse_tracker("mlflow:sqlite:///m.db", here=True).target == f"sqlite:///{tmp_path}/m.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert str(parse_tracker("mlflow", here=True)) == "mlflow:http://other"


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ("tensorbord", r"did you mean 'tensorboard'\? The tracker is unknown"),
        ("wandb", "The tracker is unknown: give 'tensorboard' or 'mlflow'"),
        ("mlflow", "give MLflow's store, mlflow:sqlite:////FOLDER/mlflow.db"),
        ("mlflow:./mlruns", "stores in plain folders are deprecated"),
        ("mlflow:file:///tmp/mlruns", "stores in plain folders are deprecated"),
        ("mlflow:https://me:secret@host", "contains a password"),
        ("tensorboard:s3://bucket/logs", "give a folder on the coordinator's machine, not a URL"),
        (f"tensorboard:{__file__}", "is a file"),
        (["tensorboard", "tensorboard"], "has the same tracker twice"),
    ],
)
def test_what_is_not_one_is_refused_when_the_environment_is_built(
    track: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RecipeError, match=message) as caught:
        SimEnv(track=track)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [SimEnv, PocEnv])
@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow:http://host"])
def test_a_library_that_is_missing_is_refused_by_its_extra(
    tracker: str, kind: type[SimEnv] | type[PocEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = ("tensorboardX", "mlflow")
    monkeypatch.setattr("fedpool.tasks.track.find_spec", lambda name: None if name in absent else find(name))
    extra = tracker.partition(":")[0]
    with pytest.raises(RecipeError, match=rf'is not installed: pip install "fedpool\[{extra}\]"'):
        kind(track=[tracker])
    # In production the coordinator is another machine: what is installed here is irrelevant.
    assert ProdEnv(store="s3://x", sites=("a",), track=[tracker]).track == (tracker,)


def test_production_takes_paths_of_its_coordinator_only() -> None:
    with pytest.raises(RecipeError, match="give an absolute path, because the coordinator's machine writes there"):
        ProdEnv(store="s3://x", sites=("a",), track=["tensorboard:logs"])


def test_tensorboard_needs_a_folder_where_the_store_is_not_one() -> None:
    check_places(["tensorboard"], is_local=True)
    check_places(["tensorboard:/logs", "mlflow:http://host"], is_local=False)
    with pytest.raises(RecipeError, match="give a folder on the coordinator's machine"):
        check_places(["tensorboard"], is_local=False)


def test_a_job_that_is_resumed_has_the_trackers_with_which_it_began(tmp_path: Path) -> None:
    store = Store(tmp_path)
    env = SimEnv(clients=("a", "b"), track=["tensorboard", "mlflow:http://host"], workspace=tmp_path)
    said = {"sites": ("a", "b"), "environment": env.recorded().as_json()}
    again = environment_of(job_of(said), store, tmp_path)
    assert again.track == env.track == ("tensorboard", "mlflow:http://host")
    assert "track" not in SimEnv().recorded().settings  # the record of an untracked job is unchanged


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a package, acme, with these lines in the group of trackers."""

    def install(lines: str) -> None:
        about = tmp_path / "site-packages/acme-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[fedpool.trackers]\n{lines}\n")
        monkeypatch.syspath_prepend(str(about.parent))

    return install


def test_the_built_in_trackers_do_not_depend_on_what_packages_register(register: Callable[[str], None]) -> None:
    register("broken = not a module!\ntensorboard = acme.writer\nmlflow = ???")
    assert Tracker("tensorboard").module == "fedpool.tasks.tensorboard_writer"
    assert Tracker("mlflow", "http://host").module == "fedpool.tasks.mlflow_writer"
    assert SimEnv(track=["tensorboard"]).track == ("tensorboard",)
    with pytest.raises(RecipeError, match="The tracker is unknown: give 'tensorboard' or 'mlflow' or 'broken'"):
        parse_tracker("wandb", here=True)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("not a module!", "which is not the name of a module"),
        ("???", "which is not the name of a module"),
        ("acme_that_is_gone.writer", "which is not installed"),
    ],
)
def test_a_broken_registration_is_an_error_for_who_asks_for_it(
    value: str, why: str, register: Callable[[str], None]
) -> None:
    register(f"broken = {value}")
    with pytest.raises(RecipeError, match="acme registers it as .* in fedpool.trackers, " + why):
        SimEnv(track=["broken:target"])
