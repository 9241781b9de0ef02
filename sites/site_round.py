"""One assignment at one site: global model in, script, update and manifest out. The site's half of a round."""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedpool.arrays import inspect_tensors
from fedpool.client.hosts import Assignment
from fedpool.errors import FedpoolError, IntegrityError, SiteError, StoreError
from fedpool.local_file import LocalFile
from fedpool.manifest import ClientJob, SiteAssignment, UpdateManifest
from fedpool.model import NUM_STEPS
from fedpool.paths import JobPaths
from fedpool.sites.output import LogLine
from fedpool.sites.session import Reply, Session
from fedpool.store import Store, to_json
from fedpool.tensors import Digest, Inspection, TensorReader

MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SiteFolder:
    """A site's own folder: what it fetched and what its script writes."""

    path: Path
    kept: Path
    """What stays with the site over rounds, and after the job."""

    @property
    def update(self) -> Path:
        """Where the script writes its update."""
        return self.path / "update.safetensors"


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a site has put into the store: the manifest, its hash, and what was seen of the update's bytes on their way there.

    `inspection` is None where nobody who is trusted has seen them, or there are none.
    """

    manifest: UpdateManifest
    manifest_sha256: str
    inspection: Inspection | None = None


def read_delivery(store: Store, job_id: str, round: int, site: str, attempt: int) -> Delivery:
    """What a site has put into the store, as its manifest says; it is not to be trusted before the gate has judged it.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: what lies there is no manifest, or longer than one can be.
    """
    path = JobPaths(job_id).manifest(round, site, attempt)
    try:
        if (size := store.size(path)) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"its manifest has {size} bytes, {MAX_MANIFEST_BYTES} are allowed")
        data = store.read_bytes(path)
        return Delivery(UpdateManifest.model_validate_json(data), hashlib.sha256(data).hexdigest())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"its manifest is invalid: {where + ': ' if where else ''}{first['msg']}") from None


def site_seed(job_seed: int, site: str, round: int) -> int:
    """A seed for everything random in a script: a function of (job seed, site, round), in [0, 2**63)."""
    digest = hashlib.sha256(f"{job_seed}/{site}/{round}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def run_site_round(
    job: ClientJob,
    assignment: SiteAssignment,
    *,
    session: Session,
    store: Store,
    folder: SiteFolder,
    deadline: float | None,
    log: LogLine,
    trusted: bool = False,
) -> Delivery:
    """Do an assignment and commit what came of it to the store.

    Args:
        trusted: the global model's bytes were written by this very process, so they are not hashed again.

    Returns: the manifest as written to the store, and what was seen of the update on its way there.

    Raises:
        SiteError: the script or the store failed.
    """
    started = time.monotonic()
    paths = JobPaths(job.job_id)
    site, round, attempt = assignment.site, assignment.round, assignment.attempt
    try:
        base = Digest(assignment.base_sha256, assignment.base_size)
        model = store.fetch(paths.global_model(round), folder.path, None if trusted else base)
        state = None
        if assignment.state_sha256 is not None:
            digest = Digest(assignment.state_sha256, assignment.state_size)
            state = store.fetch(paths.state(round - 1), folder.path, None if trusted else digest)
        initial = None
        if job.initial is not None and round > 0:
            known = Digest(job.initial.sha256, job.initial.size)
            initial = store.fetch(paths.global_model(0), folder.path, None if trusted else known, again=True)
        work = Assignment(
            round=round,
            total_rounds=job.total_rounds,
            task=assignment.task,
            model=str(model),
            update=str(folder.update),
            kept=str(folder.kept),
            extras=str(state) if state else None,
            # A site's own model is to be scored at other sites, as it is.
            transfer="FULL" if assignment.task == "submit_model" else job.transfer,
            exclude=job.exclude,
            seed=site_seed(job.seed, site, round),
            attempt=attempt,
            used=None if assignment.used is None else assignment.used.model_dump(),
            initial=str(initial) if initial else None,
        )
        reply = _perform(session, work, restarts=job.restarts, deadline=deadline, log=log)
        update = reply.update
        inspection = None
        if update["params_type"] is not None:
            inspection = _deliver(folder.update, store, paths.update(round, site, attempt))
        manifest = UpdateManifest(
            job_id=job.job_id,
            site=site,
            round=round,
            attempt=attempt,
            task=assignment.task,
            base_sha256=assignment.base_sha256,
            assignment_sha256=hashlib.sha256(to_json(assignment.model_dump(mode="json"))).hexdigest(),
            params_type=update["params_type"],
            sha256=inspection.digest.sha256 if inspection else None,
            size=inspection.digest.size if inspection else 0,
            weight=_weight(update["meta"]),
            metrics=_finite(update["metrics"]),
            logged=_finite(reply.logged),
            meta=update["meta"],
            seconds=time.monotonic() - started,
        )
        written = store.write_json(paths.manifest(round, site, attempt), manifest.model_dump(mode="json"))
    except (OSError, StoreError) as error:
        raise SiteError(site, round, f"the store failed: {error}") from error
    return Delivery(manifest, written.sha256, inspection)


def _perform(session: Session, work: Assignment, *, restarts: int, deadline: float | None, log: LogLine) -> Reply:
    """Have the script do an assignment; one that fails is started again, unless it was killed on purpose."""
    failure: SiteError | None = None
    while True:
        try:
            return session.perform(work, deadline=deadline, log=log)
        except SiteError as error:
            failure = error
        except FedpoolError:
            if failure is None:
                raise
            raise failure from None  # what starts scripts is gone, too: why the first one failed says more
        if restarts == 0 or session.killed or (deadline is not None and time.monotonic() >= deadline):
            raise failure
        restarts -= 1
        log(f"it is started again, because it failed: {failure.cause}")


def _deliver(local: Path, store: Store, path: str) -> Inspection:
    """Hash what the script wrote, here and not in the script, which is the user's code; then move it into the store."""
    reader = TensorReader(LocalFile(local), local.stat().st_size, where=local.name)
    inspection = inspect_tensors(reader, store.block_elements)
    store.adopt(local, path)
    return inspection


def _weight(meta: Mapping[str, Any]) -> float | str:
    value = meta.get(NUM_STEPS, 1)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return float(value)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
