"""What an ordinary client script reaches at a real site, beyond what it was given."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpool import ConfigError, Store
from fedpool.sites.config import SiteConfig
from fedpool.sites.script_environment import for_scripts
from tests.sites.test_resident import Job, Site

# Answers the round, and prints what the code before it has put into `seen`, as JSON in lines that
# are short enough for the log.
REPORTS = """
import json
import numpy as np
import fedpool.client as flare

flare.init()
while flare.is_running():
    flare.receive()
    text = json.dumps(seen)
    for start in range(0, len(text), 1000):
        print(f"seen:{text[start:start + 1000]}:")
    flare.send(flare.FLModel(params={"w": np.zeros(1, np.float32)}))
"""

SECRETS = {
    "PREFECT_API_AUTH_STRING": "operator:hush",
    "AWS_SECRET_ACCESS_KEY": "hush",
    "AWS_ACCESS_KEY_ID": "hush",
    "FEDPOOL_SITE_STORAGE_OPTIONS": '{"secret": "hush"}',
    "FEDPOOL_ALLOWED_CODE": "any",
    "HTTPS_PROXY": "http://user:hush@proxy:3128",
    "SOME_TOKEN": "hush",
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(**settings: Any) -> Site:
        sites.append(Site(tmp_path / f"site-{len(sites)}", **{"store": str(tmp_path / "store")} | settings))
        return sites[-1]

    yield make
    for site in sites:
        site.resident.close()


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Any]:
    """Runs code in a script at a site, and returns what it puts into `seen`."""

    def ask(site: Site, code: str) -> Any:
        script = tmp_path / "client.py"
        script.write_text(textwrap.dedent(code) + REPORTS)
        job = Job(Store(tmp_path / "store"), script)
        job.assign()
        site.printed.clear()
        assert site.perform(job)
        return json.loads("".join(line[5:-1] for line in site.printed if line.startswith("seen:")))

    return ask


def test_a_script_sees_no_secret_of_its_worker(
    site: Callable[..., Site], ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    # Also not in the environment of any process between the worker and the script.
    seen = ask(
        site(storage_options={}),
        """
        import os, pathlib, psutil
        chain = [psutil.Process(), *psutil.Process().parents()]
        guard = next(each for each in chain if "fedpool.sites.script_process" in each.cmdline())
        seen = [dict(os.environ), guard.environ()]
        """,
    )
    for environment in seen:
        assert not SECRETS.keys() & environment.keys()
        assert not any("hush" in value for value in environment.values())
    assert seen[0]["PATH"]


def test_the_operator_names_further_variables_that_scripts_get(
    site: Callable[..., Site], ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "MY_A", "MY_B", "MINE"):
        monkeypatch.setenv(name, "x")
    here = site(script_environment=["HF_HOME", "MY_*"])
    seen = ask(here, "import os\nseen = sorted(name for name, value in os.environ.items() if value == 'x')")
    assert seen == ["HF_HOME", "MY_A", "MY_B"]


def test_scripts_get_what_libraries_and_devices_need() -> None:
    given = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "TZ": "UTC",
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_DEBUG": "INFO",
        "OMP_PROC_BIND": "true",
        "LD_LIBRARY_PATH": "/cuda",
        "PYTHONPATH": "/lib",
        "PYTHONSTARTUP": "/evil.py",
        "LD_PRELOAD": "/evil.so",
        "HOME": "/root",
    }
    assert for_scripts(given, ()) == {
        name: value for name, value in given.items() if name not in ("PYTHONSTARTUP", "LD_PRELOAD", "HOME")
    }
    assert for_scripts(given, ["LD_*"])["LD_PRELOAD"] == "/evil.so"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*", r"'\*' is not the name of a variable, or its beginning and a \*"),
        ("A=1", "'A=1' is not the name of a variable"),
        ("PREFECT_*", "scripts never get PREFECT_.* and FEDPOOL_.*: leave 'PREFECT_\\*' out"),
        ("FEDPOOL_SITE_CONFIG", "leave 'FEDPOOL_SITE_CONFIG' out"),
        ("P*", "leave 'P\\*' out"),
    ],
)
def test_the_workers_own_secrets_cannot_be_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"script_environment: .*{message}"):
        SiteConfig.load(name="a", script_environment=[name])


COUNTS = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        flare.receive()
        counted = {"n": (flare.kept("count") or {"n": np.zeros(1)})["n"] + 1}
        flare.keep("count", counted)
        flare.send(flare.FLModel(params={"w": counted["n"].astype(np.float32)}))
"""


def test_what_a_job_has_kept_is_not_that_of_a_job_with_its_id_on_another_store(
    site: Callable[..., Site], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    script = write_script(COUNTS)
    first = Job(Store(tmp_path / "store"), script)
    second = Job(Store(tmp_path / "other"), script, job_id=first.paths.job_id)
    here = site()
    for job in (first, second):  # the operator moves the site to another store
        for round in (0, 1):
            job.assign(round)
            assert here.perform(job, round)
        here.resident.close()
        here = Site(here.folder, store=str(tmp_path / "other"))
    here.resident.close()
    assert (first.pid(1), second.pid(1)) == (2, 2)


def test_what_a_job_has_kept_is_not_that_of_other_code_with_its_id(
    site: Callable[..., Site], write_script: Callable[..., Path], tmp_path: Path
) -> None:
    here = site()
    first = Job(Store(tmp_path / "store"), write_script(COUNTS))
    first.assign()
    assert here.perform(first)
    here.resident.close()
    shutil.rmtree(tmp_path / "store")
    again = Job(Store(tmp_path / "store"), write_script(f"{COUNTS}    # changed"), job_id=first.paths.job_id)
    here = Site(here.folder, store=str(tmp_path / "store"))
    again.assign(1)
    try:
        assert here.perform(again, 1)
    finally:
        here.resident.close()
    assert again.pid(1) == 1


# Leaves modules in every place that an earlier job may reach, named as those that the processes of
# a site import first.
LEAVES = """
    import pathlib
    for folder in (pathlib.Path.cwd(), pathlib.Path.home()):
        for name in ("shlex", "json", "fedpool", "numpy", "sitecustomize", "usercustomize"):
            (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    seen = str(pathlib.Path.cwd())
"""


def test_what_a_script_leaves_in_its_folder_does_not_run_in_another_jobs_processes(
    site: Callable[..., Site], ask: Callable[..., Any]
) -> None:
    here = site()
    folder = Path(ask(here, LEAVES))
    other, names, home = ask(here, "import os\nseen = [os.getcwd(), os.listdir(), os.path.expanduser('~')]")
    assert other != str(folder) and names == [] and home == other
    assert not (folder / "ran").exists()


def test_a_worker_does_not_look_for_modules_in_its_current_folder(
    site: Callable[..., Site], ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shlex", "json", "runpy", "traceback"):  # of the guard, and of what starts the script
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    assert ask(site(), "seen = 1") == 1
    assert not (tmp_path / "ran").exists()


def test_the_pythons_that_a_script_starts_find_the_modules_beside_them(
    site: Callable[..., Site], ask: Callable[..., Any]
) -> None:
    seen = ask(
        site(),
        """
        import pathlib, subprocess, sys
        pathlib.Path("tool.py").write_text("import beside; print(beside.VALUE)")
        pathlib.Path("beside.py").write_text("VALUE = 7")
        seen = subprocess.run([sys.executable, "tool.py"], capture_output=True, text=True).stdout
        """,
    )
    assert seen == "7\n"


# Leaves a link where the host would write if it changed the update.
LINKS = """
    import os
    import numpy as np
    import fedpool.client as flare
    from fedpool.client.hosts import SessionHost

    next_of_host, victim = SessionHost.next, os.environ["VICTIM"]

    def next(self, timeout):
        assignment = next_of_host(self, timeout)
        if assignment:
            folder = os.path.dirname(assignment.update)
            os.symlink(victim, os.path.join(folder, "leaving-update.safetensors"))
        return assignment

    SessionHost.next = next
    flare.init()
    while flare.is_running():
        flare.receive()
        flare.send(flare.FLModel(params={"w": np.ones(1, np.float32)}))
"""


def test_a_script_cannot_make_the_host_overwrite_a_file(
    site: Callable[..., Site], write_script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setenv("VICTIM", str(victim))
    here = site(script_environment=["VICTIM"])
    job = Job(Store(tmp_path / "store"), write_script(LINKS), params_transfer_type="DIFF")
    job.assign()
    assert here.perform(job)
    assert victim.read_text() == "precious"


# Runs without the capabilities that let root look into every process, as a worker in a container
# does, and that of an ordinary user.
LOOK = """
    import ctypes, os, subprocess, sys
    from fedpool.sites.own_memory import hide_memory

    CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, PR_CAPBSET_DROP = 19, 21, 38, 24
    if len(sys.argv) == 1:
        if os.geteuid() == 0:
            for capability in (CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON):
                assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0
        os.execv(sys.executable, [sys.executable, __file__, "worker"])
    read = "import os; print(len(open(f'/proc/{os.getppid()}/environ').read()) > 0)"
    look = lambda: subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert look().stdout == "True\\n"
    hide_memory()
    assert "PermissionError" in look().stderr
    assert open("/proc/self/environ").read()  # its own is still there
"""


def test_a_script_of_the_same_user_cannot_read_the_workers_memory(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux hides a process's memory from its own user")
    program = tmp_path / "look.py"
    program.write_text(textwrap.dedent(LOOK))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
