"""Where the passwords of this machine's servers are: in private files and in the environment of the
processes that need them, and nowhere else.
"""

import errno
import json
import os
import pty
import shlex
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from fedpool import ConfigError, PocEnv, ServerError
from fedpool.deployments.access import Access
from fedpool.deployments.poc_state import PocState, close_to_others
from fedpool.deployments.server import free_port, listening, private_server
from fedpool.deployments.terminal import ui_address
from tests.conftest import ADD_ONE
from tests.poc import GATED, GatedJob, brought_up, prefect, processes_of, wait_until, wait_until_gone
from tests.servers import prefect_server

pytestmark = pytest.mark.timeout(900)

JOB = """
    import os
    import numpy as np
    from fedpool import FedAvgRecipe, SimEnv

    config = dict.fromkeys(("site-1", "site-2"), {"folder": os.getcwd(), "hold": [0]})
    recipe = FedAvgRecipe(
        name="seen", min_clients=2, num_rounds=2, model={"w": np.zeros(3)}, train_script="client.py", per_site_config=config
    )
    assert recipe.execute(SimEnv()).get_result().params["w"].tolist() == [2, 2, 2]
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files_with(secret: str, folder: Path) -> list[Path]:
    """The files of a folder that have the secret in them."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def command_lines_with(secret: str) -> list[list[str]]:
    """The command lines of all processes on this machine that have the secret in them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(secret in word for word in process.info["cmdline"] or ()):
            found.append(process.info["cmdline"])
    return found


def password_of_server(process: "subprocess.Popen[bytes]") -> str:
    """The password of a job's private server, which is in its environment."""
    for child in psutil.Process(process.pid).children():
        if "fedpool.deployments.server_process" in child.cmdline():
            return str(child.environ()["PREFECT_SERVER_API_AUTH_STRING"])
    raise AssertionError("there is no server")


def test_a_simulations_password_is_in_its_servers_environment_and_in_a_private_file_only(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(textwrap.dedent(GATED))
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    temporary, output = tmp_path / "t", tmp_path / "output"
    temporary.mkdir()
    # What a shell may still have of another server neither reaches ours nor is kept.
    other = {
        "PREFECT_API_AUTH_STRING": "someone:else",
        "PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps({"authorization": "Bearer of-another-server"}),
    }
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "job.py"],
            cwd=tmp_path,
            env=plain | other | {"TMPDIR": str(temporary), "PREFECT_HOME": str(tmp_path / "prefect")},
            stdout=file,
            stderr=file,
        )
    try:
        wait_until(
            lambda: len(list(tmp_path.glob("training-site-?"))) == 2,
            timeout_s=400,
            over=lambda: process.poll() is not None,
        )
        password = password_of_server(process)
        (link_file,) = files_with(password, tmp_path)
        assert mode(link_file) == 0o600 and mode(link_file.parent) == 0o700
        assert link_file.read_text().endswith(f"#{password}\n")
        assert command_lines_with(password) == []
        told = [p for p in psutil.Process(process.pid).children(recursive=True) if password in p.environ().values()]
        assert [p.cmdline()[2] for p in told] == ["fedpool.deployments.server_process"]
        # The output is a file, which others may be able to read.
        assert f"(the link in {link_file} signs you in)" in output.read_text()
        (tmp_path / "go").touch()
        assert process.wait(400) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()
    assert files_with(password, tmp_path) == [] and files_with("of-another-server", tmp_path) == []


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocEnv]:
    """A proof of concept in a folder that was open to everyone."""
    home = tmp_path_factory.mktemp("poc")
    home.chmod(0o777)
    with brought_up(PocEnv(clients=("site-1",), s3=True, home=home, progress=False)) as env:
        yield env


@pytest.mark.slow
def test_a_proof_of_concepts_password_is_in_a_private_file_of_its_folder_only(env: PocEnv, tmp_path: Path) -> None:
    password = env.access.password
    job = GatedJob(tmp_path, env.names, num_rounds=2)
    with job.started(env) as run:
        job.wait_until_held(run)
        assert command_lines_with(password) == []
        job.release()
        assert run.get_result(300).num_rounds == 2
    assert files_with(password, env.home) == [PocState.path(env.home)]
    assert mode(env.home) == 0o700 and mode(PocState.path(env.home)) == 0o600


@pytest.mark.slow
def test_its_variables_are_all_that_other_programs_need(env: PocEnv, tmp_path: Path) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FEDPOOL_", "AWS_"))}
    fedpool = f"{sys.executable} -m fedpool.cli"
    command = (
        f'eval "$({fedpool} poc env --home {shlex.quote(str(env.home))})" && {sys.executable} -m prefect work-pool ls'
    )
    done = subprocess.run(
        ["sh", "-c", command],
        env=plain | {"PREFECT_HOME": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "fedpool-coordinator" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_second_proof_of_concept_runs_in_the_shell_of_the_first(env: PocEnv, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(textwrap.dedent(ADD_ONE))
    (tmp_path / "job.py").write_text(
        textwrap.dedent("""
            import numpy as np
            from fedpool import FedAvgRecipe, PocEnv, SimEnv

            recipe = FedAvgRecipe(
                name="second", min_clients=2, num_rounds=1, model={"w": np.zeros(3)}, train_script="client.py"
            )
            second = PocEnv(home="second", progress=False)
            try:
                assert recipe.execute(second).get_result().params["w"].tolist() == [1, 1, 1]
            finally:
                second.down()
            assert recipe.execute(SimEnv()).get_result().params["w"].tolist() == [1, 1, 1]
        """)
    )
    done = subprocess.run(
        [sys.executable, "job.py"], cwd=tmp_path, env=os.environ | env.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Prefect UI during the run" not in done.stdout  # the simulation used the first one's server
    seen = prefect(env, tmp_path, "flow-run", "ls")
    assert "second round 0" in seen.stdout, seen.stdout
    wait_until_gone(processes_of, tmp_path / "second")


@pytest.mark.slow
def test_its_store_answers_nobody_without_its_keys(env: PocEnv) -> None:
    endpoint = PocState.read(env.home).storage_options["endpoint_url"]
    wrong = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00"
    with httpx.Client(base_url=endpoint, trust_env=False, timeout=60) as client:
        for headers in ({}, {"Authorization": wrong}, {"Origin": "https://page.example"}):
            for method, path in (
                ("GET", "/"),
                ("GET", "/fedpool"),
                ("PUT", "/fedpool/x"),
                ("DELETE", "/fedpool/x"),
                ("POST", "/fedpool?delete"),
            ):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code in (400, 403), (method, path, headers)
                assert "access-control-allow-origin" not in answer.headers
    assert not (env.home / "s3/fedpool/x").exists()


@pytest.mark.slow
def test_a_program_that_takes_a_dead_servers_port_is_sent_nothing_by_up(env: PocEnv) -> None:
    (server,) = [service for service in env.status() if service.name == "server"]
    assert server.pid is not None
    killed = psutil.Process(server.pid)
    killed.kill()
    killed.wait(60)
    with (
        closing(listening(env.access.port)),
        pytest.raises(ServerError, match=f"cannot listen on port {env.access.port}"),
    ):
        env.up()
    env.up()
    assert all(service.healthy for service in env.status())


def can_listen(port: int) -> bool:
    """Whether another program can have the port, even if it insists."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", port))
            other.listen()
        except OSError as error:
            assert error.errno == errno.EADDRINUSE
            return False
        return True


def test_no_other_program_can_take_the_port_while_the_server_starts() -> None:
    with private_server() as server:  # it takes seconds to start, and its port is no secret
        assert not can_listen(server.access.port)
        server.wait()
        assert not can_listen(server.access.port)


def test_a_port_of_another_program_is_refused() -> None:
    with closing(listening()) as first, pytest.raises(ServerError, match=r"cannot listen on port \d+ of 127.0.0.1"):
        listening(first.getsockname()[1])


@pytest.mark.slow
def test_a_database_in_a_file_is_only_for_its_owner(tmp_path: Path) -> None:
    with prefect_server(tmp_path / "server", f"sqlite+aiosqlite:///{tmp_path}/database.db"):
        assert {mode(path) for path in tmp_path.glob("database.db*")} == {0o600}


def test_the_link_is_for_the_eyes_at_a_terminal(tmp_path: Path) -> None:
    access = Access.new(free_port())
    with (tmp_path / "log").open("w") as file:
        shown = ui_address(Console(file=file, force_terminal=True), access, "as written there")
        assert shown == f"{access.address} (as written there)"
    near, far = pty.openpty()
    with os.fdopen(near, "wb"), os.fdopen(far, "w") as terminal:
        assert ui_address(Console(file=terminal), access, "as written there") == access.link


def test_a_folder_that_stays_open_to_others_is_refused() -> None:
    with pytest.raises(ConfigError, match="other users may look into /proc/self, and you may not change that"):
        close_to_others(Path("/proc/self"))


def test_a_proof_of_concept_without_a_password_is_of_another_version(tmp_path: Path) -> None:
    state = {
        "address": "http://127.0.0.1:9",
        "database": "d",
        "store": "s",
        "s3": False,
        "environment": {"K": "hidden"},
    }
    PocState.path(tmp_path).write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"another version of fedpool started .*: run `fedpool poc down`") as refused:
        PocState.read(tmp_path)
    assert "hidden" not in str(refused.value)


def test_a_message_about_another_database_leaves_out_its_password(tmp_path: Path) -> None:
    first, second = (f"postgresql+asyncpg://me:hidden-{n}@host/prefect" for n in (1, 2))
    state = PocState.reconcile(tmp_path, database=first, store=None, s3=False)
    assert "hidden" not in repr(state) and state.password not in repr(state)
    with pytest.raises(ConfigError, match=r"database='postgresql\+asyncpg://me:\*\*\*@host/prefect' is up") as refused:
        PocState.reconcile(tmp_path, database=second, store=None, s3=False)
    assert "hidden" not in str(refused.value)
