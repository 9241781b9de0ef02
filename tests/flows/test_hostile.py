"""A hostile site: whatever it puts in the store is rejected with a specific reason and does not
affect the global model.

The hostile site writes to the store directly, without running our code; the other site is honest.
Each case goes through the flow of a whole round, which must produce exactly the bytes of the model
that the honest site alone would produce.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from fedpool import FedAvgRecipe
from fedpool.flows.fedavg import FedAvg
from fedpool.flows.job import federated_job
from fedpool.flows.verify import verify_job
from fedpool.messages import ClientJob, SiteAssignment, UpdateManifest
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.sites.site_round import MAX_MANIFEST_BYTES, Delivery, read_delivery
from fedpool.sites.sites import SIMULATED, Traits
from fedpool.store import Store

MODEL: dict[str, np.ndarray] = {
    "w": np.zeros((2, 3), np.float32),
    "half": np.zeros(4, np.float16),
    "count": np.zeros((), np.int64),
    "small": np.zeros(2, np.int8),
    "mask": np.zeros(2, bool),
}
HONEST = {name: np.asarray(value + 1 if value.dtype != bool else ~value) for name, value in MODEL.items()}


class Sent:
    """What a site puts in the store: honest unless a case changes it."""

    def __init__(self, assignment: SiteAssignment, job: ClientJob) -> None:
        self.update = save(HONEST)
        self.manifest: dict[str, Any] = UpdateManifest(
            job_id=job.job_id,
            site=assignment.site,
            round=assignment.round,
            task="train",
            base_sha256=assignment.base_sha256,
            assignment_sha256="a" * 64,
            params_type="FULL",
            metrics={"accuracy": 0.5},
            seconds=0.1,
        ).model_dump(mode="json")
        self.raw_manifest: bytes | None = None
        self.last: Callable[[Path], object] = lambda folder: None
        self.claims: dict[str, Any] = {}

    def params(self, changes: Mapping[str, Any], *, without: str | None = None, **claims: Any) -> None:
        params = {name: value for name, value in {**HONEST, **changes}.items() if name != without}
        self.update = save({name: np.asarray(value) for name, value in params.items()})
        self.claims |= claims

    def write(self, store: Store, paths: JobPaths, assignment: SiteAssignment) -> None:
        site, round = assignment.site, assignment.round
        store.write_bytes(paths.update(round, site), self.update)
        digest = {"sha256": hashlib.sha256(self.update).hexdigest(), "size": len(self.update)}
        manifest = {**self.manifest, **digest, **self.claims}
        data = self.raw_manifest if self.raw_manifest is not None else json.dumps(manifest).encode()
        store.write_bytes(paths.manifest(round, site), data)
        self.last(Path(store.full(paths.update(round, site))).parent)


Case = Callable[[Sent], object]


def header_of(fields: Mapping[str, Any], payload: bytes = b"") -> bytes:
    head = json.dumps(fields).encode()
    return struct.pack("<Q", len(head)) + head + payload


def with_header(change: Callable[[dict[str, Any]], object]) -> Case:
    def case(sent: Sent) -> None:
        length = struct.unpack("<Q", sent.update[:8])[0]
        header = json.loads(sent.update[8 : 8 + length])
        change(header)
        sent.update = header_of(header, sent.update[8 + length :])

    return case


def claims(**fields: Any) -> Case:
    return lambda sent: sent.claims.update(fields)


def params(changes: Mapping[str, Any] | None = None, **more: Any) -> Case:
    return lambda sent: sent.params(changes or {}, **more)


def raw(data: bytes) -> Case:
    return lambda sent: setattr(sent, "update", data)


def raw_manifest(data: bytes) -> Case:
    return lambda sent: setattr(sent, "raw_manifest", data)


def instead(name: str, put: Callable[[Path], object]) -> Case:
    """Puts something that isn't a file in the place of an object."""

    def last(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return lambda sent: setattr(sent, "last", last)


def linked(at: Path) -> None:
    """A link to the other site's object."""
    at.symlink_to(at.parent.parent / "site-1" / at.name)


def linked_folder(folder: Path) -> None:
    """A folder that is a link to the other site's."""
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("site-1"))


def flipped(at: int) -> Case:
    def case(sent: Sent) -> None:
        sent.claims = {"sha256": hashlib.sha256(sent.update).hexdigest()}
        data = bytearray(sent.update)
        data[at] ^= 0x10
        sent.update = bytes(data)

    return case


def truncated(sent: Sent) -> None:
    sent.claims = {"sha256": hashlib.sha256(sent.update).hexdigest(), "size": len(sent.update)}
    sent.update = sent.update[:-5]


def filled(name: str, value: float, dtype: Any = None) -> Case:
    there = MODEL[name]
    return params({name: np.full(there.shape, value, dtype or there.dtype)})


def a_pickle() -> bytes:
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(np.asarray(value)) for name, value in HONEST.items()}, file)
    return file.getvalue()


DEEP = b"[" * 100_000 + b"]" * 100_000
WIDE = {f"x{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(50_000)}

CASES: dict[str, tuple[Case, str, str]] = {
    # values
    "NaN": (filled("w", np.nan), "not_finite", "w holds NaN or infinity"),
    "infinity": (filled("w", np.inf), "not_finite", "w holds NaN or infinity"),
    "minus infinity in half precision": (filled("half", -np.inf), "not_finite", "half holds NaN or infinity"),
    "1e38 of double precision times ten": (filled("w", 1e39, np.float64), "range", "w: it holds 1e+39"),
    "more than half precision holds": (filled("half", 1e6, np.float32), "range", "half: it holds 1e+06"),
    "more than a byte holds": (filled("small", 300, np.int64), "range", "small: it holds 300"),
    "a difference that leaves the range": (
        params({"w": np.full((2, 3), 3e38, np.float32)}, params_type="DIFF"),
        "range",
        "w: it holds 3e+38",
    ),
    # names, shapes and dtypes
    "an extra key": (params({"backdoor": np.zeros(1)}), "unknown_parameter", "the model lacks: backdoor"),
    "a missing key": (params(without="w"), "missing_parameter", "it lacks parameters of the model: w"),
    "a renamed key": (params({"W": HONEST["w"]}, without="w"), "unknown_parameter", "the model lacks: W"),
    "no keys": (raw(save({})), "missing_parameter", "count, half, mask, small, w"),
    "a name that leaves the folder": (
        params({"../../global": np.zeros(1)}),
        "unknown_parameter",
        "the model lacks: ../../global",
    ),
    "a name of a megabyte": (params({"x" * 60_000: np.zeros(1)}), "unknown_parameter", "xxx..."),
    "a transposed shape": (params({"w": np.zeros((3, 2), np.float32)}), "shape", "w: expected [2, 3], got [3, 2]"),
    "a flat shape": (params({"w": np.zeros(6, np.float32)}), "shape", "w: expected [2, 3], got [6]"),
    "a row that would broadcast": (params({"w": np.zeros((1, 3), np.float32)}), "shape", "got [1, 3]"),
    "a vector that would broadcast": (params({"w": np.zeros(3, np.float32)}), "shape", "got [3]"),
    "a number that would broadcast": (params({"w": np.zeros((), np.float32)}), "shape", "got []"),
    "an axis too many": (params({"w": np.zeros((1, 2, 3), np.float32)}), "shape", "got [1, 2, 3]"),
    "an array for a number": (params({"count": np.zeros(1, np.int64)}), "shape", "count: expected [], got [1]"),
    "an empty array": (params({"w": np.zeros((0, 3), np.float32)}), "shape", "got [0, 3]"),
    "integers for floats": (params({"w": np.zeros((2, 3), np.int32)}), "dtype", "w: expected F32, got I32"),
    "floats for integers": (params({"count": np.zeros((), np.float32)}), "dtype", "count: expected I64, got F32"),
    "bytes for booleans": (params({"mask": np.zeros(2, np.uint8)}), "dtype", "mask: expected BOOL, got U8"),
    # claims in the manifest
    "an old base": (claims(base_sha256="0" * 64), "base", "says base 000"),
    "another round": (claims(round=999), "round", "says round 999, expected"),
    "another attempt": (claims(attempt=1), "attempt", "says attempt 1, expected 0"),
    "another job": (claims(job_id="other-job"), "job", "says job other-job"),
    "another site's name": (claims(site="site-1"), "site", "says site site-1, expected site-2"),
    "another task": (claims(task="evaluate"), "task", "says task evaluate"),
    "metrics without parameters": (claims(params_type=None), "no_params", "send params"),
    "a weight below zero": (claims(weight=-1.0), "weight", "its weight is -1.0"),
    "a weight that is text": (claims(weight="many"), "weight", "its weight is many"),
    "a weight that is NaN": (claims(weight=float("nan")), "weight", "its weight is nan"),
    "a weight that takes the mean": (claims(weight=1e300), "weight", "its weight is 1e+300, max_weight is 1e+12"),
    "a weight that no float holds": (claims(weight=10**400), "weight", "its weight is inf"),
    "an infinite weight": (claims(weight=float("inf")), "weight", "its weight is inf"),
    # bytes
    "truncated": (truncated, "bytes", "its manifest says"),
    "a bit flipped in the values": (flipped(-3), "bytes", "its manifest says"),
    "a bit flipped in the header": (flipped(9), "bytes", ""),
    "a size that is not its own": (claims(size=10**15), "bytes", "its manifest says 1000000000000000"),
    "oversized": (raw(bytes(1 << 20)), "size", "more than any update of this model"),
    "a pickle": (raw(pickle.dumps(HONEST)), "bytes", "is not a valid safetensors file"),
    "a torch checkpoint": (raw(a_pickle()), "bytes", "is not a valid safetensors file"),
    "nothing": (raw(b""), "bytes", "is not a valid safetensors file"),
    "a header longer than the file": (raw(struct.pack("<Q", 1 << 40) + b"{}"), "bytes", "claims 1099511627776 bytes"),
    "a header of nothing but brackets": (raw(struct.pack("<Q", 60_000) + DEEP[:60_000]), "bytes", "is not JSON"),
    "a header of fifty thousand tensors": (raw(header_of(WIDE)), "size", "more than any update"),
    "tensors that overlap": (
        with_header(lambda head: head["half"].update(data_offsets=head["w"]["data_offsets"][:1] * 2)),
        "bytes",
        "is not a valid safetensors file",
    ),
    "bytes behind the tensors": (lambda sent: setattr(sent, "update", sent.update + b"hidden"), "bytes", "describes"),
    "a shape below zero": (with_header(lambda head: head["w"].update(shape=[-2, -3])), "bytes", "a bad shape"),
    "a shape of any size": (with_header(lambda head: head["w"].update(shape=[1 << 62] * 4)), "bytes", "'w' is F32"),
    "a dtype nobody knows": (with_header(lambda head: head["w"].update(dtype="PICKLE")), "bytes", "unknown dtype"),
    "a header that is a list": (raw(header_of([1, 2])), "bytes", "is not a JSON object"),  # type: ignore[arg-type]
    # what isn't a file
    "a link to the other's update": (instead("update.safetensors", linked), "bytes", "is a symbolic link"),
    "a link to the other's manifest": (instead("update.json", linked), "manifest", "is a symbolic link"),
    "a link to the other's folder": (
        lambda sent: setattr(sent, "last", linked_folder),
        "manifest",
        "is a symbolic link",
    ),
    "a FIFO for an update": (instead("update.safetensors", os.mkfifo), "bytes", "is a FIFO"),
    "a FIFO for a manifest": (instead("update.json", os.mkfifo), "manifest", "is a FIFO"),
    # manifests
    "a manifest that is no JSON": (raw_manifest(b"\x80\x04}"), "manifest", "its manifest is invalid"),
    "a manifest of nothing but brackets": (raw_manifest(DEEP), "manifest", "its manifest is invalid"),
    "a manifest of two megabytes": (
        raw_manifest(b" " * (MAX_MANIFEST_BYTES + 1)),
        "manifest",
        "its manifest has 1048577 bytes, but only 1048576 are allowed",
    ),
    "a manifest with a field of its own": (claims(run="rm -rf /"), "manifest", "run: Extra inputs"),
    "a manifest of another protocol": (claims(protocol=1), "manifest", "protocol"),
    "seventy thousand scores": (
        claims(metrics={str(number): 0 for number in range(70_000)}),
        "metrics",
        "metrics: it has 70000 entries, but at most 1000 are allowed",
    ),
    "a score that nothing can be added to": (claims(metrics={"loss": 1.7e308}), "metrics", "loss is 1.7e+308"),
    "a score that ends the job": (claims(metrics={"accuracy": 1e6}), "metrics", "metric_ranges says 0 to 1"),
    "a scalar that nothing can be added to": (claims(logged={"loss": -1.7e308}), "logged", "loss is -1.7e+308"),
    "a number of four hundred digits": (claims(meta={"rows": 10**400}), "meta", "rows is 1000"),
    "a round of a negative eternity": (claims(seconds=-1e308), "seconds", "it took -1e+308 s"),
    "a hash of half a megabyte": (claims(sha256="x" * 500_000), "manifest", "is not a sha256 in hex"),
    "a score that is no number": (claims(metrics={"accuracy": float("nan")}), "manifest", "metrics.accuracy"),
    "a score that is infinite": (claims(metrics={"accuracy": float("inf")}), "manifest", "metrics.accuracy"),
}


class HostileSites:
    """Two sites behind a store: site-1 is honest, site-2 sends one case per round."""

    traits: ClassVar[Traits] = SIMULATED
    num_slots = 2
    names: tuple[str, ...] = ("site-1", "site-2")
    cancelled = False
    endings: Mapping[str, str] = MappingProxyType({})

    __slots__ = ("_cases", "_job", "_store")

    def __init__(self, *cases: Case) -> None:
        self._cases = cases

    def open(self, job: ClientJob, store: Store) -> None:
        self._job, self._store = job, store

    async def announce(self, site: str, round: int, attempt: int) -> bool:
        return True

    async def unreachable(self, sites: Collection[str]) -> dict[str, str]:
        return {}

    async def perform(
        self, assignment: SiteAssignment, *, deadline: float | None, patience_s: float, log: LogLine
    ) -> Delivery:
        sent = Sent(assignment, self._job)
        if assignment.site == "site-2" and assignment.task == "train":
            self._cases[assignment.round](sent)
        paths = JobPaths(self._job.job_id)
        sent.write(self._store, paths, assignment)
        return read_delivery(self._store, self._job.job_id, assignment.round, assignment.site, assignment.attempt)

    def cancel(self) -> None: ...

    async def end(self) -> None: ...


def run_cases(folder: Path, *cases: Case) -> tuple[Store, JobPaths]:
    """Run and verify a job with one case per round."""
    (folder / "client.py").write_text("import fedpool.client\n")
    recipe = FedAvgRecipe(
        name="hostile",
        min_clients=1,
        num_rounds=len(cases),
        model=MODEL,
        train_script=folder / "client.py",
        stop_cond="accuracy >= 0.8",
        metric_ranges={"accuracy": (0, 1)},
        final_evaluation=False,
    )
    store, job_id = Store(folder / "runs"), "hostile-0"
    asyncio.run(federated_job(recipe, job_id, store.url, HostileSites(*cases)))
    verify_job(store, job_id)
    return store, JobPaths(job_id)


@pytest.fixture(scope="module")
def attacked(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, JobPaths]:
    """A job that has been through all the cases, in order."""
    return run_cases(tmp_path_factory.mktemp("hostile"), *(send for send, _, _ in CASES.values()))


@pytest.mark.parametrize("case", CASES)
def test_it_is_rejected_with_its_own_reason_and_changes_nothing(case: str, attacked: tuple[Store, JobPaths]) -> None:
    store, paths = attacked
    number, (_, code, words) = list(CASES).index(case), CASES[case]
    record = store.read_json(paths.record(number))
    assert [entry["site"] for entry in record["accepted"]] == ["site-1"]
    assert [(entry["site"], entry["code"]) for entry in record["rejected"]] == [("site-2", code)]
    assert words in record["rejected"][0]["reason"]
    assert len(record["rejected"][0]["reason"]) < 1100
    assert store.read_bytes(paths.global_model(number + 1)) == save_as_written(HONEST)


@dataclass(frozen=True)
class Swapping(FedAvg):
    """Swaps site-2's update between the gate and the aggregation, which reads `surveys` first."""

    path: Path = Path()

    @property
    def surveys(self) -> bool:
        data = bytearray(self.path.read_bytes())
        if data[-1] != 0xFF:
            data[-1] = 0xFF
            self.path.write_bytes(data)
        return False


class SwappingRecipe(FedAvgRecipe):
    def strategy(self, num_sites: int) -> Any:
        folder = Path(self.train_script).parent / "runs/hostile-0/rounds/00000"
        return Swapping(path=folder / "sites/site-2/update.safetensors")


def test_an_update_that_is_swapped_after_the_gate_is_left_out(prefect_api: str, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("import fedpool.client\n")
    recipe = SwappingRecipe(
        name="hostile", min_clients=1, num_rounds=1, model=MODEL, train_script=tmp_path / "client.py"
    )
    store, paths = Store(tmp_path / "runs"), JobPaths("hostile-0")
    asyncio.run(federated_job(recipe, "hostile-0", store.url, HostileSites(filled("w", 5.0))))
    record = store.read_json(paths.record(0))
    assert [entry["site"] for entry in record["accepted"]] == ["site-1"]
    assert [(entry["site"], entry["code"]) for entry in record["rejected"]] == [("site-2", "changed")]
    assert "was changed after it was checked" in record["rejected"][0]["reason"]
    assert store.read_bytes(paths.global_model(1)) == save_as_written(HONEST)


def test_a_second_update_of_a_site_is_not_looked_at(prefect_api: str, tmp_path: Path) -> None:
    def twice(sent: Sent) -> None:
        sent.params({"w": np.full((2, 3), np.nan, np.float32)})
        folder = tmp_path / "runs" / sent.manifest["job_id"] / "rounds/00000/attempts/1/sites/site-2"
        folder.mkdir(parents=True)
        (folder / "update.safetensors").write_bytes(save(HONEST))

    store, paths = run_cases(tmp_path, twice)
    rejected = store.read_json(paths.record(0))["rejected"]
    assert [(entry["site"], entry["attempt"], entry["code"]) for entry in rejected] == [("site-2", 0, "not_finite")]
    assert store.read_bytes(paths.global_model(1)) == save_as_written(HONEST)


def save_as_written(params: Mapping[str, Any]) -> bytes:
    from fedpool.arrays import save_and_hash

    with contextlib.closing(io.BytesIO()) as file:
        save_and_hash(file, params)
        return file.getvalue()


def test_a_weight_at_the_end_of_the_range_is_a_weight_and_0_counts_nothing(prefect_api: str, tmp_path: Path) -> None:
    weights = (0.0, 1e12, 1e-308)
    store, paths = run_cases(tmp_path, *(claims(weight=weight, metrics={"loss": 1e100}) for weight in weights))
    for number, weight in enumerate(weights):
        record = store.read_json(paths.record(number))
        assert [entry["weight"] for entry in record["accepted"]] == [1.0, weight]
        assert all(np.isfinite(value) for value in record["metrics"].values())
        assert store.read_bytes(paths.global_model(number + 1)) == save_as_written(HONEST)
