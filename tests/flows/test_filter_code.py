"""A custom filter's code travels to the sites, which run it only if they allow it."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpool import ConfigError, FedAvgRecipe, IntegrityError, Store
from fedpool.allowed_code import VARIABLE
from fedpool.filters import described
from fedpool.flows.staging import stage
from fedpool.messages import ClientJob
from fedpool.paths import JobPaths
from fedpool.sites.config import SiteConfig
from fedpool.sites.site_filters import load_filters
from tests.own_algorithm import forget, job_code_forgotten

SCALING = """
from fedpool import ElementwiseFilter

class Scaling(ElementwiseFilter):
    factor: float = 8.0

    def outgoing_values(self, values, block, context):
        return values * self.factor
"""


class Folder:
    """The user's folder, first on sys.path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store(path / "store")
        (path / "client.py").write_text("import fedpool.client\n")

    def staged(self, job_id: str, text: str = SCALING) -> ClientJob:
        """Stage a job with the filter, then make this process forget the filter's class."""
        (self.path / "scaling_of_mine.py").write_text(text)
        importlib.invalidate_caches()
        kind = importlib.import_module("scaling_of_mine").Scaling
        fields: dict[str, Any] = {"name": "job", "min_clients": 2, "num_rounds": 2, "model": {"w": np.zeros(3)}}
        recipe = FedAvgRecipe(**fields, train_script=str(self.path / "client.py"), filters=(kind(factor=2),))
        stage(recipe, job_id, self.store, ("site-1", "site-2"))
        forget(self.path)
        sys.path.remove(str(self.path))
        described = self.store.read_json(JobPaths(job_id).job)
        return ClientJob.model_validate(described["client"], strict=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.delenv(VARIABLE, raising=False)
    with job_code_forgotten():
        yield Folder(tmp_path)


def site(**settings: Any) -> SiteConfig:
    return SiteConfig(name="site-1", store="memory://jobs", **settings)


def test_a_site_refuses_code_that_it_does_not_allow_with_the_remedy(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder.path))
    job = folder.staged("job-1")
    assert job.filter_code is not None
    sha256 = job.filter_code.sha256
    with pytest.raises(
        ConfigError,
        match=rf"(?s)job-1 brings code for scaling_of_mine:Scaling \(scaling_of_mine\.py\), sha256 {sha256}.*Site site-1 does "
        rf'not allow it.*allowed_code = "{sha256}"',
    ):
        load_filters(job, folder.store, site().allow_code)
    with pytest.raises(ConfigError, match="does not allow it"):
        load_filters(job, folder.store, site(allowed_code="0" * 64).allow_code)
    with pytest.raises(ConfigError, match="allowed_code has 'scaling': give sha256 hashes"):
        load_filters(job, folder.store, site(allowed_code="scaling").allow_code)
    assert "scaling_of_mine" not in sys.modules


def test_it_runs_what_it_allows_and_not_what_that_became(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder.path))
    job = folder.staged("job-1")
    assert job.filter_code is not None
    allowed = site(allowed_code=job.filter_code.sha256)
    found = load_filters(job, folder.store, allowed.allow_code)
    assert described(found) == job.filters == ({"type": "scaling_of_mine:Scaling", "factor": 2.0},)
    sys.modules["kept"] = sys.modules.pop("scaling_of_mine")  # so the user's process can import the changed module
    sys.path[:] = [place for place in sys.path if "fedpool-code-" not in place]
    monkeypatch.syspath_prepend(str(folder.path))
    changed = folder.staged("job-2", SCALING.replace("* self.factor", "* 2 * self.factor"))
    del sys.modules["kept"]
    with pytest.raises(ConfigError, match="does not allow it"):
        load_filters(changed, folder.store, allowed.allow_code)
    monkeypatch.setenv(VARIABLE, "any")
    load_filters(job, folder.store, site().allow_code)
    other = load_filters(changed, folder.store, site().allow_code)  # in the same process, one after the other
    values = np.ones(1)
    assert [each.outgoing_values(values, None, None).tolist() for each in (*found, *other)] == [[2.0], [4.0]]  # type: ignore[attr-defined]


def test_a_job_without_filters_tells_its_sites_nothing_of_them(folder: Folder) -> None:
    fields: dict[str, Any] = {"name": "job", "min_clients": 2, "num_rounds": 2, "model": {"w": np.zeros(3)}}
    stage(FedAvgRecipe(**fields, train_script=str(folder.path / "client.py")), "job-1", folder.store, ("site-1",))
    assert not {"filters", "filter_code"} & set(folder.store.read_json("job-1/job.json")["client"])


def test_code_that_was_changed_in_the_store_is_not_run(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder.path))
    job = folder.staged("job-1")
    assert job.filter_code is not None
    path = JobPaths("job-1").code(job.filter_code.sha256)
    folder.store.remove(path)
    folder.store.write_bytes(path, b"other")
    with pytest.raises(IntegrityError, match="does not match the hash in its name"):
        load_filters(job, folder.store, site(allowed_code="any").allow_code)
