"""A job resumed from the command line continues in the environment in which it began."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpool import PocEnv, ProdEnv, RecipeError, Run, SimEnv
from fedpool.cli import main
from fedpool.deployments.resumed import environment_of
from fedpool.environment import Begin
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.tasks.job_record import JobRecord
from tests.records import job_of

# In every round, each site logs its name and the id of the process that trained.
SCRIPT = """
    import os, pathlib
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        with pathlib.Path("{log}").open("a") as file:
            file.write(f"{{flare.get_site_name()}} {{os.getpid()}}\\n")
        flare.send(flare.FLModel(params=model.params))
"""


def forget(store: Store, job_id: str, number: int) -> None:
    """Delete the results of a round and of everything after it, as if the coordinator had been lost
    before the round.
    """
    paths = JobPaths(job_id)
    for gone in (paths.result, paths.record(number)):
        store.remove(gone)
    store.fs.rm(store.full(paths.sites(number)), recursive=True)
    for later in range(number + 1, 4):
        if store.fs.exists(store.full(paths.round(later))):
            store.fs.rm(store.full(paths.round(later)), recursive=True)


def test_a_simulation_of_fresh_scripts_goes_on_with_fresh_scripts(
    run_job: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    run = run_job(SCRIPT.format(log=log), env={"keep_alive": False, "num_threads": 1}, num_rounds=3)
    store = Store(tmp_path / "runs")
    forget(store, run.job_id, 1)
    log.unlink()
    with pytest.raises(SystemExit, match="0"):
        main(["job", "resume", run.job_id, "--store", store.url])
    assert f"{run.job_id}: COMPLETED" in capsys.readouterr().out
    trained = log.read_text().splitlines()
    assert len(set(trained)) == len(trained) == 4  # two sites in each of two rounds, each in its own process


def test_an_environment_says_what_it_is_and_is_made_of_that_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sites = ("a", "b")
    sim = SimEnv(
        clients=sites, workspace=tmp_path, keep_alive=False, num_threads=1, logs="console", command={"a": "python"}
    )
    prod = ProdEnv(store=store.url, sites=sites, look_ahead=1, coordinator_pool="mine")
    poc = PocEnv(clients=sites, home=tmp_path / "poc", look_ahead=2)
    for env in (sim, prod):
        job = job_of(
            {
                "sites": sites,
                "simulated": env is sim,
                "environment": env.recorded().as_json(),
            }  # as it is in the store
        )
        assert environment_of(job, store, tmp_path) == env
    job = job_of({"sites": sites, "simulated": False, "environment": poc.recorded().as_json()})
    down = environment_of(job, store, tmp_path)
    assert isinstance(down, ProdEnv) and (down.look_ahead, down.sites) == (2, sites)
    (tmp_path / "poc").mkdir()
    (tmp_path / "poc/poc.json").write_text("{}")
    assert environment_of(job, store, tmp_path) == poc


def test_a_job_of_an_earlier_version_goes_on_with_the_defaults(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert environment_of(job_of({}), store, tmp_path) == SimEnv(clients=("site-1",), workspace=tmp_path)
    found = environment_of(job_of({"simulated": False}), store, tmp_path)
    assert found == ProdEnv(store=store.url, sites=("site-1",))


def test_the_options_of_the_store_that_the_job_lies_in_are_those_of_the_environment(tmp_path: Path) -> None:
    store = Store(tmp_path.as_uri(), auto_mkdir=True)
    env = environment_of(job_of({"simulated": False}), store, tmp_path)
    assert isinstance(env, ProdEnv) and env.open_store().storage_options == {"auto_mkdir": True}


def test_no_secret_is_recorded(tmp_path: Path) -> None:
    env = ProdEnv(
        store="s3://bucket",
        storage_options={"secret": "hidden"},
        sites=("a",),
        auth_string="me:hidden",
        api_url="https://me:hidden@host/api",
    )
    assert b"hidden" not in env.recorded().to_bytes() and b"host" not in env.recorded().to_bytes()


def test_settings_that_do_not_fit_this_machine_are_named_with_the_way_out(tmp_path: Path) -> None:
    environment = {"type": "SimEnv", "settings": {"command": "no-such-program --x"}}
    with pytest.raises(RecipeError, match=r"(?s)began with settings .* no program 'no-such-program'.*resume='job-1'"):
        environment_of(job_of({"environment": environment}), Store(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"fork": True}, "fork and from_round need resume"), ({"resume": "job-1", "from_round": 2}, "without fork=True")],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Begin(**fields)


def test_a_job_records_where_it_was_begun(run_job: Callable[..., Run], tmp_path: Path) -> None:
    run = run_job(num_rounds=1, env={"keep_alive": False})
    job = JobRecord.read(Store(tmp_path / "runs"), JobPaths(run.job_id).job)
    assert job.environment is not None and job.environment.type == "SimEnv"
    assert job.environment.settings["keep_alive"] is False
