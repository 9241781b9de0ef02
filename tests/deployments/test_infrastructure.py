"""The units and compose files of deployments/infrastructure, checked with the programs that use
them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FILES = Path(__file__).resolve().parent.parent.parent / "deployments/infrastructure"


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"the program {name} is missing: apt-get install {package}")
    return found


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    analyze = program("systemd-analyze", "systemd")
    for unit in (FILES / "systemd").glob("*.service"):
        installed = unit.read_text().replace("/opt/fedpool/bin/", f"{Path(sys.executable).parent}/")
        (tmp_path / unit.name).write_text(installed)
    units = sorted(tmp_path.iterdir())
    assert len(units) == 3
    checked = subprocess.run([analyze, "verify", *units], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout == ""


@pytest.mark.parametrize(
    ("file", "variables"),
    [
        (
            "compose.yaml",
            "FEDPOOL_IMAGE DATABASE_PASSWORD SERVER_AUTH STORE "
            "COORDINATOR_AWS_ACCESS_KEY_ID COORDINATOR_AWS_SECRET_ACCESS_KEY",
        ),
        (
            "site.yaml",
            "FEDPOOL_IMAGE PREFECT_API_URL SERVER_AUTH SITE_NAME SITE_STORE SITE_DATA "
            "SITE_AWS_ACCESS_KEY_ID SITE_AWS_SECRET_ACCESS_KEY",
        ),
    ],
)
def test_compose_accepts_the_files_and_names_what_is_missing(file: str, variables: str) -> None:
    compose = program("docker-compose", "docker-compose")
    environment = {"PATH": os.environ["PATH"]} | {name: f"/a/{name.lower()}" for name in variables.split()}

    def config(environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        command = [compose, "-f", str(FILES / "compose" / file), "config"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")

    accepted = config(environment)
    assert accepted.returncode == 0, accepted.stderr
    for name, value in environment.items():
        if name != "PATH":
            assert value in accepted.stdout, name
    for name in variables.split():
        refused = config({key: value for key, value in environment.items() if key != name})
        assert refused.returncode != 0 and name in refused.stderr, name
