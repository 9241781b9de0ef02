"""A site takes jobs from one store only: the one that its operator has named."""

import functools
import http.server
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import FedAvgRecipe, Store
from fedpool.flows.staging import stage
from fedpool.messages import SiteAssignment
from fedpool.paths import JobPaths, new_job_id
from tests.asked import AskedJob, final_state, run_deployment
from tests.poc import Worker, scripts_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SITE = "hospital-b"

STEALS = """
    import pathlib
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        pathlib.Path(CANARY).write_text(pathlib.Path(flare.get_config()["data"], "patients.csv").read_text())
        flare.send(flare.FLModel(params=model.params))
"""


class Hospital:
    """A site with a store, a patient file, and a worker that shares both with no one."""

    def __init__(self, api_url: str, folder: Path) -> None:
        self.store = folder / "store"
        self.store.mkdir()
        data = folder / "data"
        data.mkdir()
        (data / "patients.csv").write_text("a patient\n")
        settings = folder / "site.toml"
        settings.write_text(f'name = "{SITE}"\nfolder = "{folder / "work"}"\nstore = "{self.store}"\n')
        command = ("site", "start", "--config", str(settings), "--data", str(data))
        self.worker = Worker(api_url, folder / "worker", "fedpool.cli", *command)


@pytest.fixture(scope="module")
def hospital(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    made = Hospital(prefect_api, tmp_path_factory.mktemp("hospital"))
    try:
        made.worker.wait_until_started()
        yield made
        assert made.worker.process.poll() is None
    finally:
        made.worker.end()


class Attack:
    """A complete job in a store of the attacker's, whose script copies the site's data."""

    def __init__(self, folder: Path, store: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.canary = folder / "canary"
        script = folder / "client.py"
        script.write_text(textwrap.dedent(STEALS).replace("CANARY", repr(str(self.canary))))
        self.job_id = new_job_id("attack")
        recipe = FedAvgRecipe(
            name="attack", min_clients=1, num_rounds=1, model={"w": np.zeros(1, np.float32)}, train_script=script
        )
        target, paths = Store(store), JobPaths(self.job_id)
        digest = stage(recipe, self.job_id, target, (SITE,))
        asked = SiteAssignment(
            site=SITE, round=0, task="train", base_sha256=digest.sha256, base_size=digest.size, timeout_s=None
        )
        target.write_json(paths.assignment(0, SITE), asked.model_dump(mode="json"))

    def run(self, store: str, job_id: str | None = None) -> str:
        """Ask the site to take part; returns why it didn't."""
        asked: dict[str, Any] = {
            "job_id": self.job_id if job_id is None else job_id,
            "site": SITE,
            "round": 0,
            "attempt": 0,
            "store": store,
        }
        state = final_state(run_deployment(f"site-round/{SITE}", asked))
        assert not self.canary.exists(), f"the attacker has {self.canary.read_text()!r}"
        assert state.is_failed()
        return str(state.message)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server on a folder; yields its address, and the list of requested paths."""
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            requested.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requested
        finally:
            server.shutdown()
            thread.join()


def refusal(named: str, own: Path) -> str:
    return f"the run names the store {named!r}, but {SITE} takes jobs only from 'file://{own}'"


def test_a_run_that_names_the_attackers_web_server_is_refused_and_nothing_is_requested(
    hospital: Hospital, tmp_path: Path
) -> None:
    attack = Attack(tmp_path, tmp_path / "web")
    with served(tmp_path / "web") as (address, requested):
        assert refusal(address, hospital.store) in attack.run(address)
    assert requested == []


@pytest.mark.parametrize(
    "form", ["{store}/x/rounds/y/sites/hospital-a", "file://{store}/x/../x/rounds/y/sites/hospital-a"]
)
def test_a_run_that_names_a_folder_which_another_site_may_write_is_refused(
    form: str, hospital: Hospital, tmp_path: Path
) -> None:
    attack = Attack(tmp_path, hospital.store / "x/rounds/y/sites" / f"hospital-a-{tmp_path.name}")
    named = form.format(store=hospital.store) + f"-{tmp_path.name}"
    assert refusal(named, hospital.store) in attack.run(named)


@pytest.mark.parametrize("job_id", ["x/rounds/y/sites/hospital-a/attack", "../elsewhere/attack", "..", ".", ""])
def test_a_job_id_that_is_a_path_is_refused(job_id: str, hospital: Hospital, tmp_path: Path) -> None:
    attack = Attack(tmp_path, tmp_path / "elsewhere")
    message = attack.run(str(hospital.store), job_id)
    assert f"the run's parameters are invalid: job_id {job_id!r} cannot be part of a path" in message


@pytest.mark.parametrize("form", ["{store}", "{store}/", "file://{store}", "file://{store}/", "{store}/x/.."])
def test_its_own_store_may_be_written_in_any_form(form: str, hospital: Hospital, tmp_path: Path) -> None:
    job = AskedJob(tmp_path, SITE, store=hospital.store)
    assert final_state(job.ask(named=form.format(store=hospital.store))).is_completed()
    job.end()


def test_a_site_without_a_store_does_not_start_and_says_what_to_write(prefect_api: str, tmp_path: Path) -> None:
    command = ("fedpool.cli", "site", "start", "--name", "anywhere", "--folder", str(tmp_path / "work"))
    worker = Worker(prefect_api, tmp_path, *command)
    try:
        wait_until(lambda: worker.process.poll() is not None, over=lambda: "started!" in worker.log)
        assert worker.process.returncode == 1
        said = " ".join(worker.log.split())
        assert (
            'store: is required, but was not given; give store in the site\'s file, such as store = "s3://fl-jobs"'
            in said
        )
        assert "FEDPOOL_SITE_STORE" in said and "Traceback" not in said
    finally:
        worker.end()
    assert not scripts_of(tmp_path)
