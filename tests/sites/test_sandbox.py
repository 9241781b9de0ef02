"""What a client script reaches from a site's sandbox, and what the site says where none works."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpool import ConfigError, SiteError, Store
from fedpool.sites.bubblewrap import python_folders
from fedpool.sites.config import SiteConfig
from fedpool.sites.sandbox import PROGRAM, WITHOUT, Sandbox
from tests.poc import scripts_of, wait_until_gone
from tests.sites.test_resident import Job, Site
from tests.sites.test_what_scripts_reach import REPORTS

STANDARD = {"run": "bubblewrap", "network": False}
NOBODY = "nobody"
_COPIED = "TEST_SANDBOX_BY_A_COPIED_PYTHON"


@pytest.fixture(autouse=True)
def bubblewrap_works() -> None:
    if shutil.which(PROGRAM) is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes a site with a sandbox, in a folder that other users can reach."""
    sites: list[Site] = []

    def make(**sandbox: Any) -> Site:
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(folder.stat().st_mode | 0o011)
        settings = {**STANDARD, "read": [], "user": None, **sandbox}
        sites.append(Site(tmp_path / "site", store=str(tmp_path / "store"), sandbox=settings))
        return sites[-1]

    yield make
    for site in sites:
        site.resident.close()
        wait_until_gone(scripts_of, site.folder)


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Any]:
    """Runs code in a script at a site, and returns what it puts into `seen`."""

    def ask(site: Site, code: str, **fields: Any) -> Any:
        script = tmp_path / "client.py"
        script.write_text(textwrap.dedent(code) + REPORTS)
        job = Job(Store(tmp_path / "store"), script, **fields)
        job.assign()
        site.printed.clear()
        assert site.perform(job)
        return json.loads("".join(line[5:-1] for line in site.printed if line.startswith("seen:")))

    return ask


TRIES = """
    import os, pathlib, socket, subprocess, sys

    def tried(what, *arguments):
        try:
            return what(*arguments) or "works"
        except Exception as error:
            return type(error).__name__
"""


def python_parents() -> set[Path]:
    return {parent for folder in python_folders() for parent in (folder, *folder.parents)}


def test_a_script_sees_no_secret_no_network_and_no_other_job(
    here: Callable[..., Site], ask: Callable[..., Any], tmp_path: Path
) -> None:
    patients, secret = tmp_path / "patients", tmp_path / "site.toml"
    patients.mkdir(mode=0o755)
    (patients / "one.csv").write_text("a,b")
    secret.write_text("password")
    site = here(read=[str(patients)])
    others = site.folder / "work" / "other-job"
    others.mkdir(parents=True)
    (others / "model.pt").write_text("theirs")
    with socket.create_server(("127.0.0.1", 0)) as door:
        seen = ask(
            site,
            TRIES
            + f"""
    seen = {{
        "data": tried(pathlib.Path({str(patients)!r}, "one.csv").read_text),
        "written": tried(pathlib.Path({str(patients)!r}, "two.csv").write_text, "x"),
        "settings": tried(pathlib.Path({str(secret)!r}).read_text),
        "other": tried(pathlib.Path({str(others)!r}, "model.pt").read_text),
        "shadow": tried(pathlib.Path("/etc/shadow").read_text),
        "home": tried(os.listdir, "/root"),
        "root": tried(pathlib.Path("/mine").write_text, "x"),
        "python": tried(pathlib.Path(sys.executable + "x").write_text, "x"),
        "connect": tried(socket.create_connection, ("127.0.0.1", {door.getsockname()[1]}), 5),
        "resolve": tried(socket.getaddrinfo, "example.org", 80),
        "processes": sorted(filter(str.isdigit, os.listdir("/proc")), key=int),
        "host": socket.gethostname(),
        "capabilities": [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")],
        "shell": subprocess.run(["/bin/sh", "-c", "echo runs"], capture_output=True, text=True).stdout,
        "work": tried(pathlib.Path("mine").write_text, "x"),
        "tmp": tried(pathlib.Path("/tmp/mine").write_text, "x"),
        "loopback": tried(lambda: socket.create_server(("127.0.0.1", 0)).close()),
    }}
    """,
        )
    assert len(seen.pop("processes")) <= 3  # itself, its sandbox's first one, and no other
    home = seen.pop("home")  # Python may be below it
    assert home == "FileNotFoundError" or {Path("/root", name) for name in home} <= python_parents()
    assert seen == {
        "data": "a,b",
        "written": "OSError",
        "settings": "FileNotFoundError",
        "other": "FileNotFoundError",
        "shadow": "FileNotFoundError",
        "root": "OSError",
        "python": "OSError",
        "connect": "ConnectionRefusedError",
        "resolve": "gaierror",
        "host": "site",
        "capabilities": ["0000000000000000"],
        "shell": "runs\n",
        "work": 1,
        "tmp": 1,
        "loopback": "works",
    }
    assert not Path("/tmp/mine").exists()
    assert not (patients / "two.csv").exists()


def test_torch_trains_and_tensors_are_kept_in_the_sandbox(here: Callable[..., Site], ask: Callable[..., Any]) -> None:
    seen = ask(
        here(),
        """
        import numpy as np
        import torch
        from torch.utils.data import DataLoader

        total = sum(batch.sum().item() for batch in DataLoader(torch.arange(8.0), batch_size=2, num_workers=1))
        seen = [total, torch.get_num_threads()]
        """,
    )
    assert seen[0] == 28


@pytest.mark.parametrize(
    ("sandbox", "code", "error"),
    [
        ({"max_memory_gb": 2}, "bytearray(3 << 30)", "MemoryError"),
        ({}, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", r"exit code 137 \(SIGKILL\)"),
        ({"max_round_s": 3}, "import threading\nthreading.Event().wait()", "before the round's deadline"),
    ],
)
def test_what_exceeds_a_limit_fails_and_nothing_of_it_stays(
    sandbox: dict[str, Any], code: str, error: str, here: Callable[..., Site], tmp_path: Path
) -> None:
    site = here(**sandbox)
    script = tmp_path / "client.py"
    script.write_text(f"import fedpool.client as flare\nflare.init()\nflare.receive()\n{code}\n")
    job = Job(Store(tmp_path / "store"), script)
    job.assign()
    with pytest.raises(SiteError, match=error):
        site.perform(job)
    site.resident.close()
    wait_until_gone(scripts_of, site.folder)


def test_a_script_that_lacks_a_file_is_told_of_the_sandbox(here: Callable[..., Site], tmp_path: Path) -> None:
    site = here(read=[str(tmp_path)])
    script = tmp_path / "client.py"
    script.write_text("import fedpool.client as flare\nflare.init()\nflare.receive()\nopen('/srv/scans/index')\n")
    job = Job(Store(tmp_path / "store"), script)
    job.assign()
    with pytest.raises(SiteError, match="FileNotFoundError"):
        site.perform(job)
    told = [line for line in site.printed if "the script ran in the site's sandbox" in line]
    assert len(told) == 1
    assert f"it has no network, may write to its current folder and /tmp, and may read {tmp_path}" in told[0]


def by_a_python_for_all(test: str) -> None:
    """Run a test by a copy of this Python in a folder that every user can read."""
    assert _COPIED not in os.environ, "the copy cannot be run, either"

    def copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another disk
            shutil.copy2(source, target)

    # Not in the test's folder: pytest closes its parent to others whenever it starts.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        skipped = shutil.ignore_patterns("test", "site-packages")
        shutil.copytree(sys.base_prefix, f"{folder}/python", symlinks=True, copy_function=copy, ignore=skipped)
        program = f"{folder}/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        packages = os.pathsep.join(path for path in sys.path if "site-packages" in path or path.endswith("/src"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ran = subprocess.run(
            [program, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
            cwd=Path(__file__).parents[2],
            env=environment | {"PYTHONPATH": packages, _COPIED: "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0 and "1 passed" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.skipif("os.geteuid() != 0", reason="only root can run scripts as another user")
def test_a_user_of_its_own_reaches_its_job_and_not_what_is_not_for_it(
    here: Callable[..., Site], ask: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    secret = tmp_path / "site.toml"
    secret.write_text("password")
    secret.chmod(0o600)
    try:
        Sandbox(run="user", user=NOBODY, network=True).check()
    except ConfigError as error:  # this Python is in a folder for one user
        assert "run as the user nobody, who cannot run Python here" in str(error)
        assert "install Python and fedpool where this user can read them" in str(error)
        by_a_python_for_all(request.node.nodeid)
        return
    seen = ask(
        here(run="user", user=NOBODY, network=True, max_processes=50),
        TRIES
        + f"""
    seen = [os.getuid(), os.getgroups(), tried(pathlib.Path({str(secret)!r}).read_text)]
    seen.append(tried(pathlib.Path("mine").write_text, "x"))
    seen.append(tried(lambda: [subprocess.Popen(["sleep", "600"]) for _ in range(99)]))
    """,
    )
    assert seen[0] == 65534 and 0 not in seen[1]
    assert seen[2:] == ["PermissionError", 1, "BlockingIOError"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": "user", "network": True}, 'run = "user" needs the name of the user'),
        (
            {"run": "user", "user": "nobody"},
            'run = "user" cannot keep scripts from the network: say so with network = true',
        ),
        ({"run": "none"}, 'run = "none" cannot keep scripts from the network'),
        ({"run": "none", "network": True, "user": "nobody"}, 'user = .nobody. needs run = "user"'),
        ({"user": "nobody"}, 'with run = "bubblewrap", leave user out'),
        ({"run": "none", "network": True, "read": ["/data"]}, 'run = "none" cannot limit what scripts read'),
        ({"read": ["data"]}, "read: 'data' is not an absolute path"),
        ({"netwrok": True}, "sandbox.*netwrok.*: did you mean network"),
        ({"run": "docker"}, "sandbox.*must be 'bubblewrap', 'user' or 'none'"),
        ({"max_memory_gb": 0}, "sandbox.*must be greater than 0, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_remedy(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDPOOL_SITE_SANDBOX")
    with pytest.raises(ConfigError, match=message):
        SiteConfig.load(name="a", store="s3://jobs", sandbox=settings)
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (tmp_path / "site.toml").write_text("\n".join(['name = "a"', 'store = "s3://jobs"', "[sandbox]", *lines]))
    with pytest.raises(ConfigError, match=message):
        SiteConfig.load(tmp_path / "site.toml")


def test_the_default_is_the_sandbox_and_the_option_replaces_what_the_file_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDPOOL_SITE_SANDBOX")
    assert SiteConfig.load(name="a", store="s3://jobs").sandbox == Sandbox()
    (tmp_path / "site.toml").write_text(
        'name = "a"\nstore = "s3://jobs"\n[sandbox]\nread = ["/data"]\nmax_round_s = 5\n'
    )
    assert SiteConfig.load(tmp_path / "site.toml").sandbox == Sandbox(read=(Path("/data"),), max_round_s=5)
    found = SiteConfig.load(tmp_path / "site.toml", sandbox=WITHOUT).sandbox
    assert found == Sandbox(run="none", network=True, max_round_s=5)


def test_a_sandbox_that_works_here_passes_its_trial(tmp_path: Path) -> None:
    Sandbox(read=(tmp_path,)).check()
    Sandbox(network=True).check()
    Sandbox(run="none", network=True).check()


def test_a_sandbox_that_does_not_work_here_is_named_with_cause_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"\[sandbox\] read: '/nowhere' does not exist: correct the path"):
        Sandbox(read=(Path("/nowhere"),)).check()
    with pytest.raises(ConfigError, match="user = 'no-such-user' is not a user of this machine: create it"):
        Sandbox(run="user", network=True, user="no-such-user").check()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"bwrap is not on the worker's PATH: install bubblewrap .*or choose another"):
        Sandbox().check()
    # What a kernel without namespaces for everyone makes bubblewrap say.
    (tmp_path / PROGRAM).write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / PROGRAM).chmod(0o755)
    with pytest.raises(
        ConfigError, match=r"does not work here .*No permissions to create new namespace.*: allow names"
    ):
        Sandbox().check()


@pytest.mark.skipif("os.geteuid() != 0", reason="gives up root's rights")
def test_only_root_becomes_another_user() -> None:
    code = """
        import os
        from fedpool import ConfigError
        from fedpool.sites.sandbox import Sandbox

        os.setgroups([])
        os.setuid(65534)
        try:
            Sandbox(run="user", network=True, user="daemon").check()
        except ConfigError as error:
            print(error)
        """
    ran = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "[sandbox] user = 'daemon': only root can run scripts as another user" in ran.stdout
