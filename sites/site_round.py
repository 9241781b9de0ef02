"""The site's half of a round: global model in, script, update and manifest out."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedpool.bounds import as_float, fits
from fedpool.client.hosts import Assignment
from fedpool.errors import FedpoolError, IntegrityError, SiteError, StoreError
from fedpool.filters import Filter
from fedpool.inspection import Inspection
from fedpool.job_digest import job_digest
from fedpool.messages import ClientJob, SiteAssignment, Stored, UpdateManifest
from fedpool.model import NUM_STEPS
from fedpool.paths import JobPaths
from fedpool.sites.outgoing import Outgoing
from fedpool.sites.output import LogLine
from fedpool.sites.scalars import Scalar, send_scalars
from fedpool.sites.session import Reply, Session
from fedpool.store import Store, to_json
from fedpool.tensors import Digest

MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SiteFolder:
    """A site's folders in a job.

    Attributes:
        path: the host's downloads, and its own files on the way to the store.
        outbox: where the script writes its update; may be the same folder.
        kept: for tensors that stay at the site between rounds, and after the job.
        copies: whether the script reads models in `path` alone, not in a local store.
    """

    path: Path
    outbox: Path
    kept: Path
    copies: bool = False

    @property
    def update(self) -> Path:
        """Path of the update that the script writes."""
        return self.outbox / "update.safetensors"

    @property
    def leaving(self) -> Path:
        """Path of the update that the host writes, if it changes the script's."""
        return self.path / "leaving-update.safetensors"


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a site has put into the store.

    Attributes:
        manifest: the update's manifest.
        manifest_sha256: hash of the manifest.
        inspection: inspection of the update's bytes on their way; None if there are none, or if no
            trusted process inspected them.
    """

    manifest: UpdateManifest
    manifest_sha256: str
    inspection: Inspection | None = None
    scalars: Sequence[Scalar] = ()
    """All scalars that the script logged if the site is part of this process, else none."""


def read_delivery(store: Store, job_id: str, round: int, site: str, attempt: int) -> Delivery:
    """Read what a site has put into the store. It is not trusted until the gate has judged it.

    Raises:
        FileNotFoundError: there is no manifest.
        IntegrityError: the manifest is invalid or too long.
    """
    path = JobPaths(job_id).manifest(round, site, attempt)
    try:
        if (size := store.size(path)) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"its manifest has {size} bytes, but only {MAX_MANIFEST_BYTES} are allowed")
        data = store.read_bytes(path)
        return Delivery(UpdateManifest.model_validate_json(data), hashlib.sha256(data).hexdigest())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"its manifest is invalid: {where + ': ' if where else ''}{first['msg']}") from None


def site_seed(job_seed: int, site: str, round: int) -> int:
    """The seed of a script in a round, a function of (job seed, site, round) in [0, 2**63)."""
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
    apart: bool = True,
    filters: Sequence[Filter] = (),
) -> Delivery:
    """Do an assignment, and commit the outcome to the store.

    Args:
        trusted: this process wrote the global model itself, so its bytes are not hashed again.
        apart: the coordinator is another process, so logged scalars travel through the store.
        filters: the job's filters; see `load_filters`.

    Returns: the manifest as written to the store, and the inspection of the update.

    Raises:
        SiteError: the script, a filter or the store failed.
    """
    outgoing = Outgoing(job, assignment, filters, log, trusted)
    part = _Part(job, assignment, store, folder, trusted, outgoing)
    started = time.monotonic()
    try:
        work = part.fetch()
        reply = _perform(session, work, restarts=job.restarts, deadline=deadline, log=log)
        sent = send_scalars(reply.scalars, store, job.job_id, assignment, log) if apart else None
        delivery = part.deliver(reply, Path(str(work.model)), started, sent)
        return delivery if apart else replace(delivery, scalars=reply.scalars)
    except (OSError, StoreError) as error:
        raise SiteError(assignment.site, assignment.round, f"the store failed: {error}") from error


@dataclass(frozen=True, slots=True)
class _Part:
    """A site's part of a round: what it fetches for its script, and what it delivers."""

    job: ClientJob
    assignment: SiteAssignment
    store: Store
    folder: SiteFolder
    trusted: bool
    outgoing: Outgoing

    def fetch(self) -> Assignment:
        """Fetch the round's models; returns the script's assignment."""
        job, asked, paths = self.job, self.assignment, JobPaths(self.job.job_id)
        model = self._fetch(paths.global_model(asked.round), Digest(asked.base_sha256, asked.base_size))
        state = initial = None
        if asked.state_sha256 is not None:
            state = self._fetch(paths.state(asked.round - 1), Digest(asked.state_sha256, asked.state_size))
        if job.initial is not None and asked.round > 0:
            known = Digest(job.initial.sha256, job.initial.size)
            initial = self._fetch(paths.global_model(0), known, again=True)
        return Assignment(
            round=asked.round,
            total_rounds=job.total_rounds,
            task=asked.task,
            model=str(model),
            update=str(self.folder.update),
            kept=str(self.folder.kept),
            extras=str(state) if state else None,
            exclude=job.exclude,
            seed=site_seed(job.seed, asked.site, asked.round),
            attempt=asked.attempt,
            used=None if asked.used is None else asked.used.model_dump(),
            initial=str(initial) if initial else None,
        )

    def deliver(self, reply: Reply, model: Path, started: float, scalars: Stored | None) -> Delivery:
        """Put the update into the store, and then its manifest, which commits it.

        Args:
            model: the round's global model.
            started: `time.monotonic()` when this part of the round began.
            scalars: size and hash of the stored scalars.
        """
        asked, update = self.assignment, reply.update
        paths = JobPaths(self.job.job_id)
        inspection, kind = None, update["params_type"]
        if kind is not None:
            path = paths.update(asked.round, asked.site, asked.attempt)
            inspection, kind = self.outgoing.deliver(
                self.folder.update, self.folder.leaving, model, kind, self.store, path
            )
        manifest = UpdateManifest(
            job_id=self.job.job_id,
            site=asked.site,
            round=asked.round,
            attempt=asked.attempt,
            task=asked.task,
            base_sha256=asked.base_sha256,
            assignment_sha256=hashlib.sha256(to_json(asked.model_dump(mode="json"))).hexdigest(),
            params_type=kind,
            sha256=inspection.digest.sha256 if inspection else None,
            size=inspection.digest.size if inspection else 0,
            weight=_weight(update["meta"]),
            metrics=_fitting(update["metrics"]),
            logged=_fitting(reply.logged),
            meta=update["meta"],
            scalars=scalars,
            seconds=time.monotonic() - started,
            filters=() if kind is None else self.job.filters,
            job_digest=job_digest(self.job),
        )
        where = paths.manifest(asked.round, asked.site, asked.attempt)
        written = self.store.write_json(where, manifest.model_dump(mode="json"))
        return Delivery(manifest, written.sha256, inspection)

    def _fetch(self, path: str, known: Digest, *, again: bool = False) -> Path:
        digest = None if self.trusted else known
        return self.store.fetch(path, self.folder.path, digest, again=again, copy=self.folder.copies)


def _perform(session: Session, work: Assignment, *, restarts: int, deadline: float | None, log: LogLine) -> Reply:
    """Have the script do an assignment; restart it if it fails, unless it was killed on purpose."""
    failure: SiteError | None = None
    while True:
        try:
            return session.perform(work, deadline=deadline, log=log)
        except SiteError as error:
            failure = error
        except FedpoolError:
            if failure is None:
                raise
            raise failure from None  # scripts cannot be started any more: report the first failure
        if restarts == 0 or session.killed or (deadline is not None and time.monotonic() >= deadline):
            raise failure
        restarts -= 1
        log(f"the script is restarted, because it failed: {failure.cause}")


def _weight(meta: Mapping[str, Any]) -> float | str:
    value = meta.get(NUM_STEPS, 1)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return as_float(value)


def _fitting(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if fits(value) else None for name, value in values.items()}
