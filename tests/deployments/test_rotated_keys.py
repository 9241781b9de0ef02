"""The store's keys change while a job runs: the job fails within seconds, says why, and resumes
with the new keys.
"""

import time
from pathlib import Path

import pytest
from prefect.settings import temporary_settings

from fedpool import JobFailed, JobStatus, PocEnv
from fedpool.cli import main
from fedpool.flows.verify import verify_job
from fedpool.store import Store
from tests.poc import GatedJob, processes_of, wait_until_gone
from tests.services import S3Server

pytestmark = pytest.mark.slow

SITES = ("site-1", "site-2")


def test_a_job_whose_keys_are_changed_fails_with_the_remedy_and_goes_on_with_the_new_ones(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_RESPONSE_CHECKSUM_VALIDATION")  # the store sets it itself
    monkeypatch.chdir(tmp_path)
    url = f"{s3_server.url}/rotated"
    env = PocEnv(num_clients=2, store=url, home=tmp_path / "poc", progress=False)
    try:
        job = GatedJob(tmp_path / "job", SITES)
        run = job.recipe.execute(env=env, wait=False)
        job.wait_until_held(run)
        s3_server.rotate_keys()
        job.release()
        began = time.monotonic()
        assert run.wait(300)
        assert time.monotonic() - began < 60
        assert run.get_status() is JobStatus.FAILED
        with pytest.raises(JobFailed) as caught:
            run.get_result()
        said = str(caught.value)
        assert said.startswith(f"job {run.job_id} failed: s3://") and "\n" not in said, said
        assert "the store does not know the access key (InvalidAccessKeyId); set AWS_ACCESS_KEY_ID" in said
        assert f"then resume the job: fedpool job resume {run.job_id} --store {url}" in said

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, s3_server.environment[name])
        with pytest.raises(SystemExit), temporary_settings(env.settings()):
            main(["job", "show", run.job_id, "--store", url])
        shown = capsys.readouterr().out
        assert f"{run.job_id}: FAILED" in shown and f"fedpool job resume {run.job_id}" in shown

        env.down()  # the workers take their keys from their environment
        env.up()
        again = job.recipe.execute(env=env, resume=run.job_id)
        assert again.get_status() is JobStatus.COMPLETED
        assert again.get_result().params["w"].tolist() == [3, 3, 3]
        assert verify_job(Store(url), run.job_id).num_rounds == 3
    finally:
        env.down()
        wait_until_gone(processes_of, tmp_path / "poc")
