"""Ceph's S3 server, radosgw, on a cluster of one monitor and one disk in memory, for tests."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from botocore.session import get_session

from fedpool.deployments.server import free_port
from tests.services import PLAIN_ENVIRONMENT, Process

MISSING = "Ceph's programs are missing: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"
_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

_SETTINGS = """
[global]
fsid = {fsid}
mon host = 127.0.0.1:{monitor}
mon initial members = a
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 1073741824
mon allow pool size one = true
mon data avail crit = 0
run dir = {folder}
admin socket =
log file = {folder}/$name.log
crash dir = {folder}
mon data = {folder}/mon.a
osd data = {folder}/osd.0
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""

_EVERYTHING = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"]}
    ],
}
"""The owner's policy: on Ceph, objects belong to the users who wrote them."""


def find_ceph() -> bool:
    """Whether all of Ceph's programs that are needed are installed."""
    return all(shutil.which(program) for program in _PROGRAMS)


class RadosGateway:
    """A running server with one bucket, and users with policies of their own. `environment` has the
    variables of the bucket's owner.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tests-ceph-"))
        self._processes: list[Process] = []
        ports = {"monitor": free_port(), "gateway": free_port()}
        self.endpoint = f"http://127.0.0.1:{ports['gateway']}"
        self.bucket = "bucket"
        self.url = f"s3://{self.bucket}"
        self._fsid = str(uuid.uuid4())
        (self._folder / "ceph.conf").write_text(_SETTINGS.format(fsid=self._fsid, folder=self._folder, **ports))
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        try:
            self._start(ports["monitor"])
            key, secret = self.new_user("owner", caps="user-policy=*")
            self.environment |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
            self.client("s3", key, secret).create_bucket(Bucket=self.bucket)
            self._allow("owner", _EVERYTHING)
        except BaseException:
            self.close()
            raise

    def client(self, service: str, key: str, secret: str) -> Any:
        """A client of the server, for "s3" or "iam"."""
        return get_session().create_client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            region_name="us-east-1",
        )

    def new_user(self, name: str, policy: Mapping[str, Any] | None = None, *, caps: str = "") -> tuple[str, str]:
        """Make a user with a policy; returns its access key and secret."""
        key, secret = f"key{secrets.token_hex(4)}", secrets.token_hex(16)
        keys = [f"--access-key={key}", f"--secret-key={secret}", *([f"--caps={caps}"] if caps else [])]
        self._run("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}", *keys)
        if policy is not None:
            self._allow(name, policy)
        return key, secret

    def close(self) -> None:
        """Stop the server and the cluster, and remove the folder. Idempotent."""
        for process in reversed(self._processes):
            process.end()
        self._processes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _allow(self, name: str, policy: Mapping[str, Any]) -> None:
        owner = (self.environment["AWS_ACCESS_KEY_ID"], self.environment["AWS_SECRET_ACCESS_KEY"])
        self.client("iam", *owner).put_user_policy(
            UserName=name, PolicyName="fedpool", PolicyDocument=json.dumps(policy)
        )

    def _start(self, monitor: int) -> None:
        folder = self._folder
        for name in ("osd.0", "rgw"):
            (folder / name).mkdir()
        ring = str(folder / "keyring")
        self._run("ceph-authtool", "--create-keyring", ring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        self._run("ceph-authtool", ring, "--gen-key", "-n", "client.admin", *everything)
        self._run(
            "ceph-authtool",
            ring,
            "--gen-key",
            "-n",
            "osd.0",
            "--cap",
            "mon",
            "allow profile osd",
            "--cap",
            "osd",
            "allow *",
        )
        at = ("--add", "a", f"127.0.0.1:{monitor}", "--fsid", self._fsid)
        self._run("monmaptool", "--create", *at, str(folder / "map"))
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(folder / "map"), "--keyring", ring)
        self._serve("ceph-mon", "-i", "a")
        self._run("ceph", "--connect-timeout", "60", "osd", "new", self._fsid)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", self._fsid)
        self._run("ceph", "osd", "crush", "add", "0", "1.0", "root=default")
        self._serve("ceph-osd", "-i", "0")
        self._serve("radosgw", "-n", "client.admin").wait_until(self._answers)

    def _serve(self, program: str, *arguments: str) -> Process:
        process = Process(
            [program, "-c", self._folder / "ceph.conf", *arguments, "-f"],
            output=self._folder / f"{program}.out",
            environment=PLAIN_ENVIRONMENT,
            end_by="KILL",  # nothing has to be saved
        )
        self._processes.append(process)
        return process

    def _run(self, program: str, *arguments: str) -> None:
        settings = ("-c", str(self._folder / "ceph.conf")) if program not in ("ceph-authtool", "monmaptool") else ()
        command = [program, *settings, *arguments]
        done = subprocess.run(command, env=PLAIN_ENVIRONMENT, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.endpoint, trust_env=False).status_code == 200
        return False
