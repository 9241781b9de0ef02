"""What lives at a site between rounds: sessions that stay warm, and that end with their job, with
the site, or when idle.
"""

import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from fedpool import FedAvgRecipe, IntegrityError, SiteError, Store
from fedpool.flows.staging import stage
from fedpool.messages import SiteAssignment
from fedpool.paths import JobPaths, new_job_id
from fedpool.sites.config import SiteConfig
from fedpool.sites.resident import Resident
from tests.poc import scripts_of, wait_until, wait_until_gone

# Sends its process id, unless a file `hang` makes it wait forever.
SCRIPT = """
    import os, pathlib, threading
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        flare.receive()
        if pathlib.Path("hang").exists():
            pathlib.Path("hangs").touch()
            threading.Event().wait()
        print(flare.get_config())
        flare.send(flare.FLModel(params={"w": np.full(1, os.getpid(), np.float32)}))
    pathlib.Path("ended").touch()
"""


class Job:
    """A staged job; the test acts as its coordinator."""

    def __init__(self, store: Store, script: Path, sites: tuple[str, ...] = ("a",), **fields: Any) -> None:
        self.store = store
        self.paths = JobPaths(new_job_id("job"))
        model = {"w": np.zeros(1, np.float32)}
        self.recipe = FedAvgRecipe(
            name="job",
            min_clients=1,
            num_rounds=9,
            model=model,
            train_script=script,
            **fields,
        )
        stage(self.recipe, self.paths.job_id, store, sites)

    def assign(self, round: int = 0, timeout_s: float | None = None) -> None:
        if round > 0:
            self.store.write_bytes(self.paths.global_model(round), self.store.read_bytes(self.paths.global_model(0)))
        digest = self.recipe.model.digest
        assignment = SiteAssignment(
            site="a", round=round, task="train", base_sha256=digest.sha256, base_size=digest.size, timeout_s=timeout_s
        )
        self.store.write_json(self.paths.assignment(round, "a"), assignment.model_dump(mode="json"))

    def end(self) -> None:
        self.store.write_json(self.paths.result, {"status": "COMPLETED"})

    def pid(self, round: int = 0) -> int:
        return int(load(self.store.read_bytes(self.paths.update(round, "a")))["w"][0])


class Site:
    """A resident with its folder."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.resident = Resident(SiteConfig.load(name="a", folder=folder, **settings))
        self.printed: list[str] = []
        self.stop = threading.Event()

    def perform(self, job: Job, round: int = 0) -> bool:
        return self.resident.perform(job.paths.job_id, round, stop=self.stop, log=self.printed.append)

    def perform_aside(self, job: Job, round: int = 0) -> "Aside":
        return Aside(lambda: self.perform(job, round))


class Aside:
    """A call on its own thread, and its result."""

    def __init__(self, call: Callable[[], bool]) -> None:
        self.answer: bool | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], bool]) -> None:
        try:
            self.answer = call()
        except SiteError as error:
            self.answer = error

    def wait(self, timeout_s: float = 30) -> bool | BaseException | None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        return self.answer


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes sites, and checks that they leave no script or file behind when closed."""
    sites: list[Site] = []

    def make(**settings: Any) -> Site:
        folder = tmp_path / f"site-{len(sites)}"
        sites.append(Site(folder, **{"store": str(tmp_path / "store")} | settings))
        return sites[-1]

    yield make
    for site in sites:
        site.resident.close()
        wait_until_gone(scripts_of, site.folder)
        assert not list(site.folder.glob(".fedpool-*"))


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return lambda **fields: Job(Store(tmp_path / "store"), script, **fields)


def test_a_session_is_kept_warm_over_rounds(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job()
    for round in (0, 1):
        work.assign(round)
        assert here.perform(work, round)
    assert work.pid(0) == work.pid(1)


def test_a_script_learns_which_of_the_jobs_sites_it_is(
    site: Callable[..., Site], job: Callable[..., Job], tmp_path: Path
) -> None:
    script = tmp_path / "client.py"
    script.write_text(script.read_text().replace("flare.get_config()", "flare.system_info()"))
    here, work = site(), job(sites=("a10", "a2", "a"))
    work.assign()
    assert here.perform(work)
    who = {"job_id": work.paths.job_id, "site_name": "a", "site_index": 0, "num_sites": 3}
    assert here.printed == [str(who)]


def test_a_script_that_fails_after_the_job_is_named_in_its_log_and_in_the_store(
    site: Callable[..., Site], job: Callable[..., Job], tmp_path: Path
) -> None:
    script = tmp_path / "client.py"
    script.write_text(script.read_text() + "raise ValueError('no space left')\n")
    here, work = site(), job()
    for round in (0, 1):
        work.assign(round)
        assert here.perform(work, round)
    work.end()
    path = work.paths.ending(1, "a")
    wait_until(lambda: work.store.exists(path), timeout_s=400)
    how = work.store.read_json(path)["how"]
    assert how.startswith("the script ended with exit code 1\nTraceback")
    assert how.endswith("ValueError: no space left")
    assert f"after its last round, {how}" in here.printed


def test_a_job_that_the_site_is_no_part_of_is_refused(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job(sites=("b",))
    work.assign()
    with pytest.raises(SiteError, match="does not describe a job"):
        here.perform(work)


COUNTING = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        counted = {"n": (flare.kept("count") or {"n": np.zeros(1)})["n"] + 1}
        flare.keep("count", counted)
        flare.send(flare.FLModel(params={"w": counted["n"].astype(np.float32)}))
"""


def test_what_a_script_keeps_outlives_the_worker(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(textwrap.dedent(COUNTING))
    work = Job(Store(tmp_path / "store"), tmp_path / "client.py")
    for round in (0, 1, 2):  # each round has a new worker in the same folder
        here = Site(tmp_path / "site")
        work.assign(round)
        assert here.perform(work, round)
        here.resident.close()
        assert work.pid(round) == round + 1
    assert (tmp_path / "site" / "kept" / work.paths.job_id / "00002" / "count.safetensors").exists()


def test_an_assignment_is_waited_for(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job()
    performing = here.perform_aside(work)
    work.assign()
    assert performing.wait() is True


def test_jobs_have_sessions_of_their_own_that_run_at_the_same_time(
    site: Callable[..., Site], job: Callable[..., Job]
) -> None:
    here, first, second = site(), job(), job()
    (here.folder / "hang").touch()
    first.assign()
    hanging = here.perform_aside(first)
    wait_until((here.folder / "hangs").exists)
    (here.folder / "hang").unlink()
    second.assign()
    assert here.perform(second)
    here.resident.close()
    assert isinstance(hanging.wait(), SiteError)


def test_a_site_that_takes_one_job_at_a_time_has_the_other_wait_for_its_turn_and_say_why(
    site: Callable[..., Site], job: Callable[..., Job]
) -> None:
    here, first, second = site(max_jobs=1), job(), job()
    (here.folder / "hang").touch()
    first.assign()
    hanging = here.perform_aside(first)
    wait_until((here.folder / "hangs").exists)
    (here.folder / "hang").unlink()
    second.assign()
    waiting = here.perform_aside(second)
    why = f"(max_jobs), and {first.paths.job_id} asked first"
    wait_until(lambda: any(why in line for line in here.printed))
    assert not second.store.exists(second.paths.update(0, "a"))
    first.end()  # its script is killed, and it is the second job's turn
    assert isinstance(hanging.wait(), SiteError)
    assert waiting.wait() is True
    assert second.store.exists(second.paths.update(0, "a"))


def test_a_turn_that_is_not_wanted_any_more_is_not_waited_for(
    site: Callable[..., Site], job: Callable[..., Job]
) -> None:
    here, first, over, late = site(max_jobs=1), job(), job(), job()
    (here.folder / "hang").touch()
    first.assign()
    hanging = here.perform_aside(first)
    wait_until((here.folder / "hangs").exists)
    over.assign()
    late.assign(timeout_s=3)
    ends, misses = here.perform_aside(over), here.perform_aside(late)
    wait_until(lambda: sum("(max_jobs)" in line for line in here.printed) == 2)
    over.end()
    assert ends.wait() is False and misses.wait() is False
    here.resident.close()
    assert isinstance(hanging.wait(), SiteError)


def test_the_end_of_a_job_is_seen_from_its_result(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job()
    work.assign()
    assert here.perform(work)
    waiting = here.perform_aside(work, 1)  # announced, but never assigned
    work.end()
    assert waiting.wait() is False
    wait_until((here.folder / "ended").exists, timeout_s=400)  # the script was told
    wait_until_gone(scripts_of, here.folder, 20)


def test_a_job_that_ends_while_its_script_trains_kills_it(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job()
    (here.folder / "hang").touch()
    work.assign()
    training = here.perform_aside(work)
    wait_until((here.folder / "hangs").exists)
    work.end()
    assert "a, round 0: the run was cancelled" in str(training.wait())
    wait_until_gone(scripts_of, here.folder)


def test_idle_sessions_are_forgotten_and_come_back_when_asked(
    site: Callable[..., Site], job: Callable[..., Job]
) -> None:
    here, work = site(idle_timeout_s=0.5), job()
    work.assign()
    assert here.perform(work)
    wait_until_gone(scripts_of, here.folder, 20)
    work.assign(1)
    assert here.perform(work, 1)
    assert work.pid(0) != work.pid(1)


def test_a_stop_ends_the_wait_and_the_script(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job()
    (here.folder / "hang").touch()
    work.assign()
    training, waiting = here.perform_aside(work), here.perform_aside(work, 1)
    wait_until((here.folder / "hangs").exists)
    here.stop.set()
    assert str(waiting.wait()) == "a, round 1: the run was cancelled before the round began"
    assert str(training.wait()) == "a, round 0: the run was cancelled"
    wait_until_gone(scripts_of, here.folder)
    here.stop.clear()
    (here.folder / "hang").unlink()
    work.assign(1)
    assert here.perform(work, 1)  # only what was under way was stopped


def test_a_script_that_outlives_its_deadline_is_killed(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job()
    (here.folder / "hang").touch()
    work.assign(timeout_s=5)
    with pytest.raises(SiteError, match="a, round 0: sent no update before the round's deadline"):
        here.perform(work)
    wait_until_gone(scripts_of, here.folder)


def test_a_round_that_never_begins_is_given_up(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    with pytest.raises(SiteError, match=r"did not begin within 0.2 s \(max_wait_s\): the coordinator is gone"):
        site(max_wait_s=0.2).perform(job())


def test_a_closed_site_takes_nothing_more(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work = site(), job()
    here.resident.close()
    with pytest.raises(SiteError, match="the site was stopped"):
        here.perform(work)
    here.resident.close()  # harmless


def test_the_sites_own_settings_beat_those_of_the_job(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here = site(config={"data": "/mine", "n": 1})
    work = job(per_site_config={"a": {"data": "/theirs", "more": True}})
    work.assign()
    assert here.perform(work)
    assert here.printed == ["{'data': '/mine', 'more': True, 'n': 1}"]


def test_a_job_that_gives_the_id_of_another_is_refused(site: Callable[..., Site], job: Callable[..., Job]) -> None:
    here, work, other = site(), job(), job()
    described = work.store.read_json(work.paths.job)
    described["client"]["job_id"] = other.paths.job_id  # its update would be written into the other's folder
    work.store.remove(work.paths.job)
    work.store.write_json(work.paths.job, described)
    work.assign()
    with pytest.raises(SiteError, match=f"does not describe a job: it names the job '{other.paths.job_id}'"):
        here.perform(work)
    assert not other.store.exists(other.paths.update(0, "a"))


@pytest.mark.parametrize("what", ["model", "bundle", "assignment"])
def test_bytes_that_are_not_what_they_should_be_are_refused(
    what: str, site: Callable[..., Site], job: Callable[..., Job]
) -> None:
    here, work = site(), job()
    work.assign()
    paths = {
        "model": work.paths.global_model(0),
        "bundle": work.paths.bundle(work.recipe.bundle.sha256),
        "assignment": work.paths.assignment(0, "a"),
    }
    damaged = Path(work.store.full(paths[what]))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(SiteError, match="a, round 0: the store failed") as caught:
        here.perform(work)
    assert isinstance(caught.value.__cause__, IntegrityError)
    wait_until_gone(scripts_of, here.folder)


def test_under_torchrun_the_first_of_two_processes_talks(site: Callable[..., Site], tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            import torch.distributed as dist
            import fedpool.client as flare

            dist.init_process_group("gloo")
            flare.init(rank=dist.get_rank())
            while flare.is_running():
                model = flare.receive()
                total = model.params["w"] + 1
                dist.all_reduce(total)
                flare.send(flare.FLModel(params={"w": total}))
            dist.destroy_process_group()
            """
        )
    )
    here, work = site(command="torchrun --nproc-per-node 2"), Job(Store(tmp_path / "store"), script)
    for round in (0, 1):
        work.assign(round)
        assert here.perform(work, round)
        assert work.pid(round) == 2  # the sum over both
    work.end()
    wait_until_gone(scripts_of, here.folder, 30)


def test_a_long_folder_for_temporary_files_does_not_matter(
    site: Callable[..., Site], tmp_path: Path, write_script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 200)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    here, work = site(), Job(Store(tmp_path / "store"), write_script(SCRIPT))
    work.assign()
    assert here.perform(work)
    assert work.pid() > 0
    work.end()
    wait_until_gone(scripts_of, here.folder)


SETS_A_VARIABLE = """
    import os
    os.environ["MODE_OF_LIBRARY"] = "7"
    import a_library
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        flare.receive()
        flare.send(flare.FLModel(params={"w": np.full(1, int(a_library.MODE), np.float32)}))
"""


def test_a_library_sees_what_the_script_has_set_before_it_was_imported(
    site: Callable[..., Site], tmp_path: Path, write_script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "installed"
    library.mkdir()
    (library / "a_library.py").write_text("import os\nMODE = os.environ.get('MODE_OF_LIBRARY', '0')\n")
    monkeypatch.setenv("PYTHONPATH", str(library))
    here, work = site(), Job(Store(tmp_path / "store"), write_script(SETS_A_VARIABLE))
    work.assign()
    assert here.perform(work)
    assert work.pid() == 7
    work.end()
    wait_until_gone(scripts_of, here.folder)
