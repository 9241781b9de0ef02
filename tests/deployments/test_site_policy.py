"""The S3 policy of a site: it allows what a site does in a job, and nothing else."""

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from botocore.exceptions import ClientError
from botocore.session import get_session
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpool import ConfigError, FedAvgRecipe, ProdEnv, Recipe, Run, ScaffoldRecipe
from fedpool.allowed_code import VARIABLE
from fedpool.deployments.site_policy import site_policy
from fedpool.flows.verify import verify_job
from fedpool.paths import JobPaths
from tests.ceph import MISSING as CEPH_MISSING
from tests.ceph import RadosGateway, find_ceph
from tests.own_algorithm import importable, write_filter
from tests.poc import Worker
from tests.policies import CREATION, IF_NONE_MATCH, PREFIX, Call, EnforcedS3, allows
from tests.services import RCLONE_MISSING, S3Server, find_rclone

OWN, OTHER = "hospital-a", "hospital-b"
BUCKET = "arn:aws:s3:::fl-jobs"
POLICY = site_policy(OWN, "s3://fl-jobs/study")
NEW = {CREATION: "true", IF_NONE_MATCH: "*"}
PATHS = JobPaths("job-1")
SHA256 = "7" * 64


def may(action: str, path: str, context: dict[str, str] | None = None) -> bool:
    return allows(POLICY, action, f"{BUCKET}/study/{path}", context)


def may_write(path: str) -> bool:
    return may("s3:PutObject", path, NEW)


def may_list(prefix: str | None) -> bool:
    return allows(POLICY, "s3:ListBucket", BUCKET, {} if prefix is None else {PREFIX: prefix})


READ = [PATHS.job, PATHS.result, PATHS.tracked, PATHS.bundle(SHA256), PATHS.code(SHA256)] + [
    path for round in (0, 7, 99_999) for path in (PATHS.global_model(round), PATHS.state(round), PATHS.record(round))
]
ASSIGNMENTS = [PATHS.assignment(round, OWN, attempt) for round in (0, 31) for attempt in (0, 1, 10, 999)]


def written_by(site: str) -> list[str]:
    """Everything that a site may write."""
    return [
        place(round, site, attempt)
        for place in (PATHS.update, PATHS.manifest, PATHS.scalars, PATHS.ending)
        for round in (0, 31)
        for attempt in (0, 1, 10, 999)
    ]


@pytest.mark.parametrize("path", [*READ, *ASSIGNMENTS, *written_by(OWN)])
def test_what_a_job_needs_a_site_to_read_it_may_read(path: str) -> None:
    assert may("s3:GetObject", path)


@pytest.mark.parametrize("path", written_by(OWN))
def test_its_own_part_it_may_write_once_and_look_for(path: str) -> None:
    assert may_write(path) and may_list(f"study/{path}")
    assert may("s3:PutObject", path, {CREATION: "false"})  # a part of a large object
    assert not may("s3:PutObject", path, {CREATION: "true"})  # it might overwrite
    assert may("s3:PutObject", path), "on a server that does not know these conditions"
    assert not may("s3:DeleteObject", path)


@pytest.mark.parametrize("path", [PATHS.result, PATHS.tracked, PATHS.record(3), *ASSIGNMENTS])
def test_what_does_not_exist_yet_it_may_look_for(path: str) -> None:
    assert may_list(f"study/{path}")


@pytest.mark.parametrize("path", [*READ, *ASSIGNMENTS, PATHS.cross_site, PATHS.pruned, *written_by(OTHER)])
def test_what_others_write_it_may_not_write(path: str) -> None:
    assert not may_write(path) and not may("s3:DeleteObject", path)


@pytest.mark.parametrize(
    "path",
    [
        *written_by(OTHER),
        PATHS.assignment(0, OTHER),
        PATHS.log(OTHER),
        f"{PATHS.tensorboard}/server/events",
        PATHS.cross_site,
    ],
)
def test_what_concerns_others_it_may_not_read_or_look_for(path: str) -> None:
    assert not may("s3:GetObject", path) and not may_list(f"study/{path}")


@pytest.mark.parametrize(
    "prefix",
    [None, "", "study", "study/", "study/job-1", "study/job-1/rounds/00000/", "study/job-1/rounds/00000/sites/"],
)
def test_it_may_not_list(prefix: str | None) -> None:
    assert not may_list(prefix)


def test_another_study_in_the_same_bucket_is_out_of_reach() -> None:
    for path in (PATHS.job, PATHS.update(0, OWN)):
        for action in ("s3:GetObject", "s3:PutObject"):
            assert not allows(POLICY, action, f"{BUCKET}/{path}", NEW)
            assert not allows(POLICY, action, f"arn:aws:s3:::other/study/{path}", NEW)
        assert not may_list(path)


WORDS = ("rounds", "sites", "attempts", "assignments", OWN, OTHER, "00000", "00012", "1", "10", "job-1", "x", "")
FILES = ("update.json", "global.safetensors", "job.json", "result.json", f"{OWN}.json", f"{OTHER}.json", "bundle-1.zip")


@st.composite
def names(draw: st.DrawFn) -> str:
    """Names of objects, made of the store's own words in any order."""
    words = draw(st.lists(st.sampled_from(WORDS), max_size=12))
    return "/".join([*words, draw(st.sampled_from(FILES))])


@settings(deadline=None)  # a busy machine takes any time
@given(names())
def test_whatever_it_may_write_is_in_its_own_folders_or_in_no_round(name: str) -> None:
    """In policies `*` crosses slashes, so the words may come in any order."""
    parts = name.split("/")
    if not may_write(name):
        return
    assert parts[1] == "rounds" and "rounds" not in parts[2:]
    if re.fullmatch(r"\d{5}", parts[2]):  # otherwise the folder is not that of a round, and nobody reads it
        place = parts[3:5] if parts[3] != "attempts" else parts[5:7]
        assert place == ["sites", OWN]


@settings(deadline=None)
@given(names(), st.integers(0, 60))
def test_no_list_shows_the_name_of_something_that_concerns_others(name: str, length: int) -> None:
    prefix = f"study/{name}"[:length]
    if may_list(prefix):
        for path in (*written_by(OTHER), PATHS.assignment(0, OTHER), PATHS.log(OTHER)):
            assert not f"study/{path}".startswith(prefix)


@pytest.mark.parametrize(
    ("site", "store", "message"),
    [
        ("../a", "s3://fl-jobs", r"'../a' cannot be part of a path"),
        ("*", "s3://fl-jobs", r"'\*' cannot be part of a path"),
        ("rounds", "s3://fl-jobs", "has the name of a folder in every job"),
        (
            "a",
            "/srv/store",
            "store '/srv/store' is not on S3: only such stores have policies. Write it as s3://bucket/prefix",
        ),
        ("a", "s3://fl-*", r"store 's3://fl-\*' is not on S3"),
    ],
)
def test_what_gives_no_policy_is_said(site: str, store: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        site_policy(site, store)


def test_the_command_prints_it() -> None:
    command = [sys.executable, "-m", "fedpool.cli", "site", "policy", OWN, "--store", "s3a://fl-jobs/study/"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=400).stdout
    assert json.loads(printed) == POLICY
    assert len(json.dumps(POLICY, separators=(",", ":"))) < 6144  # what Amazon accepts as a managed policy


# A site's model is its number, and its control variate stays zero.
SCRIPT = """
    import numpy as np
    import fedpool.client as flare

    flare.init()
    number = int(flare.get_site_name()[-1])
    while flare.is_running():
        model = flare.receive()
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"score": float(abs(model.params["w"][0] - number))}))
        elif flare.is_submit_model():
            flare.send(flare.FLModel(params={"w": np.full(3, number, np.float32)}))
        else:
            extras = {"control": {"w": np.zeros(3, np.float32)}} if CONTROL else {}
            params = {"w": model.params["w"] + number}
            flare.send(flare.FLModel(params=params, metrics={"score": 1.0}, extras=extras))
"""

SITES = ("site-1", "site-2")


@dataclass(frozen=True)
class Guarded:
    """An S3 server that enforces policies.

    Attributes:
        url: of its bucket.
        environment: variables of the bucket's owner.
        keys: site -> its access key and secret.
        recorder: the server, if it records the requests and knows all conditions.
    """

    url: str
    environment: Mapping[str, str]
    keys: Mapping[str, tuple[str, str]]
    recorder: EnforcedS3 | None


@contextmanager
def our_own() -> Iterator[Guarded]:
    if find_rclone() is None:
        pytest.skip(RCLONE_MISSING)
    with closing(S3Server(num_more_keys=len(SITES))) as server:
        behind = server.endpoint.removeprefix("http://")
        keys = dict(zip(SITES, server.more_keys, strict=True))
        policies: dict[str, Mapping[str, Any]] = {
            key: site_policy(site, f"{server.url}/study") for site, (key, _) in keys.items()
        }
        with closing(EnforcedS3(behind, server.objects.parent, policies)) as enforced:
            at = {"AWS_ENDPOINT_URL": enforced.endpoint, "AWS_ENDPOINT_URL_S3": enforced.endpoint}
            yield Guarded(server.url, server.environment | at, keys, enforced)


@contextmanager
def of_ceph() -> Iterator[Guarded]:
    if not find_ceph():
        pytest.skip(CEPH_MISSING)
    with closing(RadosGateway()) as server:
        keys = {site: server.new_user(site, site_policy(site, f"{server.url}/study")) for site in SITES}
        yield Guarded(server.url, server.environment, keys, None)


class Federation:
    """A coordinator and two sites, each with its own key to a server that enforces policies."""

    def __init__(self, api_url: str, server: Guarded, folder: Path, pool: str) -> None:
        self.server = server
        self.store = f"{server.url}/study"
        self.pool = pool
        shared = {**server.environment, VARIABLE: "any"}
        self.environments = {site: shared | _as_variables(*pair) for site, pair in server.keys.items()}
        own: tuple[str, ...] = ("--pool", pool, "--store", self.store)
        self.workers = [Worker(api_url, folder / "coordinator", "fedpool.cli", "coordinator", "start", *own, **shared)]
        for site in SITES:
            own = ("--name", site, "--folder", str(folder / site), "--store", self.store)
            command = ("fedpool.cli", "site", "start", *own)
            self.workers.append(Worker(api_url, folder / site, *command, **self.environments[site]))

    def client(self, environment: Mapping[str, str]) -> Any:
        """An S3 client with the key in some variables."""
        return get_session().create_client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def calls(self) -> list[Call]:
        """The recorded requests of the last job's sites."""
        keys = [key for key, _ in self.server.keys.values()]
        return [call for call in (self.server.recorder.calls if self.server.recorder else ()) if call.key in keys]

    def forget_calls(self) -> None:
        if self.server.recorder is not None:
            self.server.recorder.calls.clear()

    def objects(self) -> dict[str, str]:
        """The name and the hash of every object."""
        found = self.client(self.server.environment).list_objects_v2(Bucket="bucket")["Contents"]
        return {entry["Key"]: entry["ETag"] for entry in found}


def _as_variables(key: str, secret: str) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}


@pytest.fixture(scope="module", params=[our_own, of_ceph])
def federation(
    request: pytest.FixtureRequest, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    file_systems = fsspec.get_filesystem_class("s3")
    with ExitStack() as stack:
        server = stack.enter_context(request.param())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in server.environment.items():
            patch.setenv(name, value)
        file_systems.clear_instance_cache()
        stack.callback(file_systems.clear_instance_cache)
        made = Federation(prefect_api, server, tmp_path_factory.mktemp("policed"), request.param.__name__)
        for worker in made.workers:
            stack.callback(worker.end)
        for worker in made.workers:
            worker.wait_until_started()
        yield made


@pytest.fixture
def run(federation: Federation, prefect_api: str, tmp_path: Path) -> Callable[..., Run]:
    """Runs a job of two rounds, and checks that nothing was refused to its sites."""

    def run(kind: type[Recipe], **fields: Any) -> Run:
        script = tmp_path / "client.py"
        script.write_text(textwrap.dedent(SCRIPT).replace("CONTROL", str(kind is ScaffoldRecipe)))
        env = ProdEnv(
            api_url=prefect_api, store=federation.store, sites=SITES, coordinator_pool=federation.pool, progress=False
        )
        model = {"w": np.zeros(3, np.float32)}
        defaults: dict[str, Any] = {"name": "policed", "min_clients": 2, "num_rounds": 2, "model": model}
        federation.forget_calls()
        done: Run = kind(**defaults | {"train_script": script, "site_retries": 0} | fields).execute(env=env)
        done.get_result(300)
        verify_job(env.open_store(), done.job_id)
        assert [call for call in federation.calls() if not call.allowed] == []
        return done

    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_scaffold_runs_with_it(run: Callable[..., Run]) -> None:
    run(ScaffoldRecipe)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cross_site_evaluation_runs_with_it(run: Callable[..., Run]) -> None:
    run(FedAvgRecipe, cross_site_eval=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_filter_that_comes_with_the_job_runs_with_it(run: Callable[..., Run], tmp_path: Path) -> None:
    with importable(write_filter(tmp_path / "own")):
        importlib.invalidate_caches()
        run(FedAvgRecipe, filters=[importlib.import_module("scaling").Scaling(factor=8)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("federation", [our_own], indirect=True)  # the one that records requests
def test_the_sites_of_a_job_ask_for_nothing_that_the_policy_lists_in_vain(
    run: Callable[..., Run], federation: Federation
) -> None:
    done = run(FedAvgRecipe)
    calls = [call for call in federation.calls() if call.key == federation.server.keys["site-1"][0]]
    asked = {
        (call.action, re.sub(r"\d{5}|[0-9a-f]{64}", "N", call.resource.partition(done.job_id)[2])) for call in calls
    }
    assert {action for action, _ in asked} == {"s3:GetObject", "s3:ListBucket", "s3:PutObject"}
    assert {path for action, path in asked if action == "s3:PutObject"} == {
        "/rounds/N/sites/site-1/update.safetensors",
        "/rounds/N/sites/site-1/update.json",
    }
    prefixes = {dict(call.context).get(PREFIX) for call in calls if call.action == "s3:ListBucket"}
    assert None not in prefixes and "" not in prefixes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_a_sites_key_nothing_else_can_be_done(run: Callable[..., Run], federation: Federation) -> None:
    done = run(FedAvgRecipe)
    paths, bucket = JobPaths(done.job_id), "bucket"
    client = federation.client(federation.environments["site-1"])
    client.get_object(Bucket=bucket, Key=f"study/{paths.job}")

    def put(path: str, **options: Any) -> None:
        client.put_object(Bucket=bucket, Key=f"study/{path}", Body=b"forged", **options)

    new = {"IfNoneMatch": "*"}
    other = paths.update(0, "site-2")
    attempts: list[tuple[str, Callable[[], Any]]] = [
        *(
            (f"writes {path}", lambda path=path: put(path, **new))
            for path in (
                *(paths.job, paths.result, paths.tracked, paths.bundle("0" * 64), paths.cross_site, paths.pruned),
                *(paths.global_model(2), paths.state(0), paths.record(5), paths.assignment(5, "site-1")),
                *(paths.update(5, "site-2"), paths.manifest(5, "site-2"), paths.manifest(5, "site-2", 1)),
                f"{paths.sites(0)}/site-2/rounds/00000/sites/site-1/update.json",
                f"{paths.sites(0)}/site-2/sites/site-1/update.json",
                f"{paths.round(0)}/attempts/1/sites/site-2/sites/site-1/update.json",
                f"{paths.round(0)}/attempts/1/assignments/sites/site-1/update.json",
                f"x/{paths.update(0, 'site-1')}",
            )
        ),
        ("overwrites its update, with the header", lambda: put(paths.update(0, "site-1"), **new)),
        ("deletes its update", lambda: client.delete_object(Bucket=bucket, Key=f"study/{paths.update(0, 'site-1')}")),
        ("deletes another's", lambda: client.delete_object(Bucket=bucket, Key=f"study/{other}")),
        ("reads another's", lambda: client.get_object(Bucket=bucket, Key=f"study/{other}")),
        (
            "reads another's assignment",
            lambda: client.get_object(Bucket=bucket, Key=f"study/{paths.assignment(0, 'site-2')}"),
        ),
        (
            "copies another's into its own folder",
            lambda: client.copy_object(
                Bucket=bucket,
                Key=f"study/{paths.update(7, 'site-1')}",
                CopySource={"Bucket": bucket, "Key": f"study/{other}"},
            ),
        ),
        ("begins a large object", lambda: client.create_multipart_upload(Bucket=bucket, Key=f"study/{paths.job}")),
        ("lists the bucket", lambda: client.list_objects_v2(Bucket=bucket)),
        ("lists the study", lambda: client.list_objects_v2(Bucket=bucket, Prefix="study/")),
        ("lists a round's sites", lambda: client.list_objects_v2(Bucket=bucket, Prefix=f"study/{paths.sites(0)}/")),
        ("looks for another's", lambda: client.list_objects_v2(Bucket=bucket, Prefix=f"study/{other}")),
        ("asks whether the bucket exists", lambda: client.head_bucket(Bucket=bucket)),
        ("reads the bucket's policy", lambda: client.get_bucket_policy(Bucket=bucket)),
        ("changes the bucket's policy", lambda: client.put_bucket_policy(Bucket=bucket, Policy="{}")),
    ]
    if federation.server.recorder is not None:  # radosgw knows the header, but no condition on it
        attempts.append(("overwrites its update", lambda: put(paths.update(0, "site-1"))))
    before = federation.objects()
    succeeded = [what for what, attempt in attempts if not _is_refused(attempt)]
    assert succeeded == []
    assert federation.objects() == before


def _is_refused(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] in (403, 412)
    return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_large_update_is_written_in_parts(federation: Federation, tmp_path: Path) -> None:
    environment, paths = federation.environments["site-1"], JobPaths("large")
    (tmp_path / "large").write_bytes(os.urandom(11 << 20))
    system = fsspec.filesystem(
        "s3",
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
    )
    target = f"bucket/study/{paths.update(0, 'site-1')}"
    federation.forget_calls()
    system.put_file(str(tmp_path / "large"), target, mode="create", chunksize=5 << 20)
    assert system.cat_file(target) == (tmp_path / "large").read_bytes()
    assert [call for call in federation.calls() if not call.allowed] == []
