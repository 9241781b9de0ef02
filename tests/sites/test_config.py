"""A site's settings, from a TOML file, the environment, or both, with clear errors if invalid."""

from pathlib import Path

import pytest

from fedpool import ConfigError
from fedpool.backend import normal_url
from fedpool.sites.config import CONFIG_VARIABLE, SiteConfig


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder and an environment without site settings."""
    for name in ("NAME", "POOL", "FOLDER", "CONFIG", "GPUS", "COMMAND", "STORE", "CONFIG_FILE"):
        monkeypatch.delenv(f"FEDPOOL_SITE_{name}", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(
        """
        name = "hospital"
        store = "s3://jobs"
        gpus = "0,1"
        command = "torchrun --nproc-per-node 2"
        max_wait_s = 60
        [config]
        data = "/data/scans"
        sizes = [1, 2]
        """
    )
    return path


def test_a_name_and_a_store_are_enough() -> None:
    settings = SiteConfig.load(name="hospital", store="s3://jobs")
    assert settings.pool_name == settings.name == "hospital"
    assert settings.command == "python" and settings.config == {} and settings.store == "s3://jobs"


def test_a_toml_file_gives_every_field(file: Path) -> None:
    settings = SiteConfig.load(file)
    assert (settings.name, settings.gpus, settings.max_wait_s) == ("hospital", "0,1", 60)
    assert settings.command == "torchrun --nproc-per-node 2"
    assert settings.config == {"data": "/data/scans", "sizes": [1, 2]}


def test_the_environment_gives_every_field_values_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NAME": "clinic",
        "STORE": "s3://jobs",
        "FOLDER": "/srv/clinic",
        "CONFIG": '{"data": "/d", "n": 3}',
        "IDLE_TIMEOUT_S": "5",
    }.items():
        monkeypatch.setenv(f"FEDPOOL_SITE_{name}", value)
    settings = SiteConfig.load()
    assert (settings.name, settings.folder, settings.idle_timeout_s) == ("clinic", Path("/srv/clinic"), 5)
    assert settings.config == {"data": "/d", "n": 3}


def test_what_is_given_beats_the_environment_which_beats_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPOOL_SITE_GPUS", "2")
    monkeypatch.setenv("FEDPOOL_SITE_POOL", "ward")
    settings = SiteConfig.load(file, pool="given", name=None)
    assert (settings.name, settings.gpus, settings.pool_name) == ("hospital", "2", "given")


def test_the_file_can_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    assert SiteConfig.load().name == "hospital"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "cannot be read: Invalid value"),
        ("store = 's3://jobs'", "name: is required, but was not given; give name in the site's file, such as name = "),
        (
            "name = 'a'",
            'store: is required, but was not given; give store in the site\'s file, such as store = "s3://fl-jobs", '
            "with the option --store, or as FEDPOOL_SITE_STORE",
        ),
        ("name = 'a'\nstore = ''", "store: must have at least 1 character, got ''"),
        ("name = '../x'", r"name: .*'../x' cannot be part of a path"),
        ("name = 'nul'", "'nul' is the name of a device"),
        ("name = 'a'\nmax_wait_s = 0", "max_wait_s: must be greater than 0, got 0"),
        ("name = 'a'\ncommand = ''", 'command is empty: write "python"'),
        ("name = 'a'\ncommand = 'torchrun \"'", "cannot be split into words .*balance its quotes"),
        ("name = 'a'\nnmae = 'b'", r"nmae: did you mean name\?"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_field_value_and_remedy(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        SiteConfig.load(path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("FEDPOOL_SITE_NAEM", "FEDPOOL_SITE_NAME"),
        ("fedpool_site_gpu", "FEDPOOL_SITE_GPUS"),
        ("FEDPOOL_SITE_CONFIGFILE", "FEDPOOL_SITE_CONFIG_FILE"),
    ],
)
def test_a_variable_that_would_be_ignored_names_the_nearest_one(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(
        ConfigError, match=rf"the environment sets {name}, which is not a setting of a site: did you mean {meant}\?"
    ):
        SiteConfig.load(name="a", store="s3://jobs")


@pytest.mark.parametrize(
    "name", ["fedpool_site_gpus", "FEDPOOL_SITE_SERVICE_HOST", "FEDPOOL_SITE_PORT_80_TCP_ADDR", "FEDPOOL_SITES"]
)
def test_a_variable_in_any_case_or_of_somebody_else_is_none_of_those(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    assert SiteConfig.load(name="a", store="s3://jobs").name == "a"


def test_a_file_that_is_not_there_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'nowhere.toml' is not a file .looked in {tmp_path}"):
        SiteConfig.load(Path("nowhere.toml"))


def test_a_variable_that_is_not_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPOOL_SITE_CONFIG", "{data: here}")
    with pytest.raises(ConfigError, match='cannot be read: error parsing value for field "config"'):
        SiteConfig.load(name="a", store="s3://jobs")


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_bytes('name = "hôpital"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec can't decode"):
        SiteConfig.load(tmp_path / "site.toml")


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ("s3://jobs", "s3://jobs/"),
        ("s3://jobs/study", "s3a://jobs/study"),
        ("/srv/store", "file:///srv/store/"),
        ("file:///srv/store", "/srv/x/../store"),
        ("store", "{here}/store"),
    ],
)
def test_the_same_store_may_be_written_in_several_forms(own: str, named: str, tmp_path: Path) -> None:
    SiteConfig(name="a", store=own).check_store(named.format(here=tmp_path))


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ("s3://jobs", "s3://jobs/x/rounds/y/sites/hospital-a"),
        ("s3://jobs", "s3://jobs2"),
        ("s3://jobs", "s3://other/../jobs"),
        ("s3://jobs", "http://jobs"),
        ("s3://jobs/study", "s3://jobs"),
        ("s3://jobs", "simplecache::s3://jobs"),
        ("s3://jobs", "jobs"),
        ("s3://jobs", ""),
        ("/srv/store", "/srv/store/x/rounds/y/sites/hospital-a"),
        ("/srv/store", "/srv/store/.."),
        ("/srv/store", "s3://srv/store"),
    ],
)
def test_a_run_that_names_another_store_is_refused_with_both(own: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SiteConfig(name="a", store=own).check_store(named)
    assert f"the run names the store {named!r}, but a takes jobs only from {normal_url(own)!r}" in str(caught.value)
