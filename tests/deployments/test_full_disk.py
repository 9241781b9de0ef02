"""A full or read-only disk, actually mounted: the error is one sentence, nothing is half-written,
and the job resumes to the same bytes.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedpool import FedAvgRecipe, JobFailed, JobStatus, Recipe, SimEnv, StoreError
from fedpool.bundle import unpack_bundle
from fedpool.cli import main
from fedpool.errors import StoreRefused
from fedpool.flows.staging import stage
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from fedpool.store import Store
from tests.conftest import ADD_ONE
from tests.records import record_of

SITES = ("site-1", "site-2")


class Disk:
    """A separate file system with an adjustable size."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def renew(self, num_kib: int) -> None:
        """Replace it with an empty one: a removed file takes up space for as long as it is open."""
        subprocess.run(["umount", "-l", self.path], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", self.path], check=True)

    def resize(self, num_kib: int) -> None:
        self._remount(f"size={num_kib}k")

    def make_read_only(self) -> None:
        self._remount("ro")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("needs Linux and the program mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def recipe(write_script: Callable[..., Path]) -> Recipe:
    return FedAvgRecipe(
        name="full",
        min_clients=2,
        num_rounds=3,
        model={"w": np.zeros(100_000, np.float32)},  # 400 KB, so the size of the disk decides when it is full
        train_script=write_script(ADD_ONE),
    )


def models_of(folder: Path) -> list[bytes]:
    return [(folder / f"rounds/{round:05d}/global.safetensors").read_bytes() for round in range(4)]


@pytest.mark.timeout(600)
def test_a_job_whose_disk_was_full_goes_on_to_the_undisturbed_bytes(
    disk: Disk, recipe: Recipe, prefect_api: str, tmp_path: Path
) -> None:
    undisturbed = recipe.execute(SimEnv(clients=SITES, workspace=tmp_path / "other", progress=False))
    env = SimEnv(clients=SITES, workspace=disk.path / "runs", progress=False)
    committed = set()
    for num_kib in (
        1000,
        2000,
        2400,
    ):  # what doesn't fit: an update of the first round, one of the second, its new model
        disk.renew(num_kib)
        run = recipe.execute(env)
        assert run.get_status() is JobStatus.FAILED
        with pytest.raises(JobFailed) as caught:
            run.get_result()
        text = str(caught.value)
        assert f"cannot be written: the disk is full (0.0 MB free on {disk.path}); free space there" in text, text
        assert "Traceback" not in text and "Errno" not in text
        there = [path for path in disk.path.rglob("*") if path.is_file() and path.suffix != ".log"]
        assert not [path for path in there if path.stat().st_size == 0 or path.name.startswith(".")]
        store = Store(disk.path / "runs")
        partly = verify_job(store, run.job_id)  # everything there is intact
        committed.add(partly.num_rounds)
        disk.resize(64 << 10)
        again = recipe.execute(env, resume=run.job_id)
        assert again.get_status() is JobStatus.COMPLETED
        assert models_of(Path(again.path)) == models_of(Path(undisturbed.path))
        assert verify_job(store, run.job_id).num_rounds == 3
    assert len(committed) > 1


def test_a_disk_without_room_for_the_beginning_of_a_job_leaves_no_job(
    disk: Disk, recipe: Recipe, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.resize(300)
    with pytest.raises(
        StoreRefused, match=rf"global\.safetensors cannot be written: the disk is full .* on {disk.path}\)"
    ):
        recipe.execute(SimEnv(clients=SITES, workspace=disk.path / "runs", progress=False))
    with pytest.raises(SystemExit):
        main(["job", "list", "--store", str(disk.path / "runs")])
    assert "it has no jobs" in capsys.readouterr().out


def test_a_workspace_that_is_read_only_is_told_before_anything_starts(
    disk: Disk, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(disk.path / "runs")
    stage(recipe, "full-20261129-120000-abcdef", store, SITES, simulated=True)
    disk.make_read_only()
    words = r"cannot be written: the file system is read-only; choose another folder, or mount it"
    with pytest.raises(StoreRefused, match=words) as caught:
        recipe.execute(SimEnv(clients=SITES, workspace=disk.path / "new", progress=False))
    assert str(caught.value).startswith(str(disk.path / "new")) and "\n" not in str(caught.value)
    with pytest.raises(StoreRefused, match=words), store.staged("a") as file:
        file.write(b"1")
    with pytest.raises(StoreRefused, match="cannot be removed: the file system is read-only"):
        store.remove(JobPaths("full-20261129-120000-abcdef").job)
    with pytest.raises(StoreRefused, match=words):
        unpack_bundle(recipe.bundle.data, disk.path / "bundle", sha256=recipe.bundle.sha256)
    for command in (("resume",), ("prune",)):
        with pytest.raises(SystemExit) as ended:
            main(["job", *command, "full-20261129-120000-abcdef", "--store", str(disk.path / "runs")])
        assert ended.value.code == 1
        assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["poc", "up", "--home", str(disk.path / "poc")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and "the file system is read-only" in said


def test_a_download_that_does_not_fit_leaves_nothing_half_written(disk: Disk, recipe: Recipe, tmp_path: Path) -> None:
    from fedpool.deployments.handle import Run
    from fedpool.tensors import Digest

    store = Store("memory://full-disk")
    digest: Digest = stage(recipe, "full-20261129-120000-abcdef", store, SITES)
    run = Run(
        "full-20261129-120000-abcdef", store, work=lambda: None, cancel=lambda: None, downloads=disk.path / "runs"
    )
    assert run.wait(300)
    disk.resize(300)
    records = [record_of({"global": {"sha256": digest.sha256, "size": digest.size}})]
    with pytest.raises(StoreError, match=rf"cannot be written: the disk is full \(.* on {disk.path}\)"):
        run._local(0, records)
    assert not [path for path in disk.path.rglob("*") if path.is_file()]
    disk.resize(64 << 10)
    assert run._local(0, records).stat().st_size == digest.size
    store.fs.rm(store.root, recursive=True)
