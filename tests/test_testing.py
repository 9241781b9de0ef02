"""The tools that break a job on purpose follow their plan, and a job recovers from it."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fedpool import JobFailed, Run
from fedpool.errors import IntegrityError, StoreError
from fedpool.store import Store
from fedpool.tensors import Digest
from fedpool.testing import MISBEHAVING_CLIENT, Fault, Faults
from fedpool.testing.client import KINDS


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path / "store")


@pytest.fixture
def store(faults: Faults) -> Store:
    return Store(faults.url)


def test_without_faults_it_is_a_store_like_any_other(store: Store, faults: Faults, tmp_path: Path) -> None:
    assert store.url == faults.url == f"faulty://{tmp_path}/store"
    digest = store.write_json("job/a/x.json", {"x": 1})
    store.write_bytes("job/b", b"12345")
    assert store.read_json("job/a/x.json") == {"x": 1}
    assert store.tree("job") == {"a/x.json", "b"}
    assert (store.names("job"), store.names(""), store.names("nothing")) == (["a", "b"], ["job"], [])
    assert store.size("job/b") == 5
    assert not store.is_local
    with store.open("job/b") as file:
        assert file.read() == b"12345"
    with pytest.raises(StoreError, match="exists already"):
        store.write_bytes("job/b", b"")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("job/c")
    store.remove("job/b")
    assert not store.exists("job/b")
    assert store.fetch("job/a/x.json", tmp_path, digest).read_bytes() == store.read_bytes("job/a/x.json")


def test_it_is_known_to_fsspec_by_its_protocol(faults: Faults) -> None:
    assert fsspec.get_filesystem_class("faulty").protocol == "faulty"


@pytest.mark.parametrize("operation", ["read", "write"])
def test_an_operation_that_fails_is_tried_again_until_it_is_over(operation: str, store: Store, faults: Faults) -> None:
    store.write_bytes("there", b"data")
    faults.plan(Fault("fail", match="there|new", operations=("read", "write")))
    mended = threading.Timer(0.5, faults.plan)
    mended.start()
    if operation == "read":
        assert store.read_bytes("there") == b"data"
    else:
        store.write_bytes("new", b"data")
    mended.join()
    assert store.read_bytes("there") == b"data"


def test_an_operation_that_goes_on_failing_is_an_error_that_names_the_object(store: Store, faults: Faults) -> None:
    faults.plan(Fault("fail", match="there", operations=("write",)))
    store.patience_s = 0.1
    with pytest.raises(
        StoreError, match=r"store/there cannot be written: OSError: .*/store/there is out of reach, as planned"
    ):
        store.write_bytes("there", b"data")


def test_a_write_that_was_cut_short_is_written_again(store: Store, faults: Faults) -> None:
    faults.plan(Fault("truncate", match="there", operations=("write",)))
    mended = threading.Timer(0.3, faults.plan)
    mended.start()
    store.write_bytes("there", b"12345678")
    mended.join()
    assert store.read_bytes("there") == b"12345678"


@pytest.mark.parametrize("theirs", [b"theirs", b"short", b"much longer"])
def test_what_another_has_written_between_two_tries_is_not_taken_for_ones_own(
    theirs: bytes, store: Store, faults: Faults, tmp_path: Path
) -> None:
    faults.plan(Fault("fail", match="there", operations=("write",)))

    def come_first() -> None:
        Store(tmp_path / "store").write_bytes("there", theirs)
        faults.plan()

    other = threading.Timer(0.3, come_first)
    other.start()
    with pytest.raises(StoreError, match="exists already"):
        store.write_bytes("there", b"ours..")
    other.join()
    assert store.read_bytes("there") == theirs


def test_a_fetch_that_was_cut_short_is_fetched_again_and_then_an_error(
    store: Store, faults: Faults, tmp_path: Path
) -> None:
    written = store.write_json("there", {"x": list(range(100))})
    faults.plan(Fault("truncate", match="there", operations=("read",), probability=0.5, seed=1))
    assert store.fetch("there", tmp_path, written).stat().st_size == written.size
    with pytest.raises(IntegrityError, match="store/there differs from its manifest"):
        store.fetch("there", tmp_path, Digest("0" * 64, written.size))


def test_faults_hit_the_same_calls_with_the_same_seed(faults: Faults) -> None:
    def outcomes(seed: int) -> list[bool]:
        faults.plan(Fault("fail", probability=0.5, seed=seed, operations=("list",)))
        system = fsspec.filesystem("faulty", skip_instance_cache=True)
        found = []
        for _ in range(40):
            try:
                found.append(system.exists(f"{faults.url}/x"))
            except OSError:
                found.append(True)
        return found

    assert outcomes(1) == outcomes(1) != outcomes(2)
    assert 5 < sum(outcomes(1)) < 35


def test_an_operation_is_held_until_the_plan_changes(store: Store, faults: Faults) -> None:
    faults.plan(Fault("hold", match="there", operations=("write",), when="after"))
    writing = threading.Thread(target=store.write_bytes, args=("there", b"data"))
    writing.start()
    faults.wait_until_held()
    assert writing.is_alive() and store.exists("there")  # it has taken effect
    faults.plan()
    writing.join(120)
    assert not writing.is_alive()
    with pytest.raises(TimeoutError, match=r"was held in 0\.1 s"):
        faults.wait_until_held(0.1)


def test_a_stall_takes_its_time_and_no_harm(store: Store, faults: Faults) -> None:
    faults.plan(Fault("stall", seconds=0.05))
    store.write_bytes("there", b"data")
    assert store.read_bytes("there") == b"data"


EXPECTED = {
    "raise": "the client raises, as planned",
    "exit": "the script ended with exit code 3",
    "kill": "the script was killed by SIGKILL",
    "hang": "sent no update before the round's deadline",
    "nan": "b holds NaN or infinity",
    "shape": "b: expected [2], got [1, 2]",
    "rename": "it has parameters that the model lacks: bx, wx",
    "huge": "max_update_norm is 1000",
    "flood": "",
}


@pytest.mark.parametrize("how", KINDS)
def test_a_client_misbehaves_by_its_plan(how: str, run_job: Callable[..., Run]) -> None:
    plan = {"site-2": {"1": how}}
    run = run_job(
        train_script=MISBEHAVING_CLIENT,
        train_args=[json.dumps(plan)],
        model={"b": np.zeros(2, np.float32), "w": np.zeros(3, np.float32)},
        min_clients=1,
        site_retries=0,
        max_update_norm=1000.0,
        num_rounds=2,
        round_timeout=5 if how == "hang" else None,
    )
    first, second = run.get_result().rounds
    assert len(first["accepted"]) == 2
    missing = second["failed"] + second["rejected"]
    if how == "flood":
        assert missing == []
    else:
        (entry,) = missing
        assert entry["site"] == "site-2" and EXPECTED[how] in entry.get("cause", entry.get("reason"))


def test_a_plan_that_says_what_no_client_does_is_named(run_job: Callable[..., Run]) -> None:
    run = run_job(train_script=MISBEHAVING_CLIENT, train_args=[json.dumps({"site-1": {"0": "sulk"}})])
    with pytest.raises(JobFailed, match="the plan has 'sulk', which is not one of raise, exit"):
        run.get_result()


@pytest.mark.parametrize(("when", "skip", "left"), [("before", 0, []), ("after", 0, ["0"]), ("before", 2, ["0", "1"])])
def test_a_process_is_killed_at_a_named_point(when: str, skip: int, left: list[str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom fedpool.store import Store\nstore = Store(sys.argv[1])\n"
        "for number in range(5):\n    store.write_bytes(f'{number}', b'')\n"
    )
    command = [sys.executable, "-m", "fedpool.testing", "--at", "/[0-9]$", "--when", when, "--skip", str(skip)]
    assert subprocess.run([*command, str(program), str(tmp_path / "store")]).returncode == -9
    assert [path.name for path in sorted((tmp_path / "store").iterdir()) if path.name[0] != "."] == left


def test_a_program_that_comes_to_no_such_point_ends_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedpool.testing", "--at", "nowhere"]
    assert subprocess.run([*command, "-m", "calendar"], stdout=subprocess.DEVNULL).returncode == 0
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 2
