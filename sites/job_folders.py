"""The folders of a job at a real site."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedpool.refusals import explained


def job_key(store: str, job_id: str, digest: str) -> str:
    """The name of a job's folders at a site: another store's job of the same id has others.

    Args:
        store: URL of the job's store.
        digest: see `fedpool.job_digest`.
    """
    text = f"{store}\n{job_id}\n{digest}"
    return f"{job_id}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class JobFolders:
    """A job's folders.

    Attributes:
        scratch: contains all others but two; removed when the job's session ends.
        work: the script's current folder and home. It stays, like `kept`.
        kept: for tensors that stay at the site between rounds, and after the job.
    """

    scratch: Path
    work: Path
    kept: Path

    @classmethod
    def make(cls, key: str, *, scratch: Path, site: Path) -> "JobFolders":
        """Make the folders of a job.

        Args:
            key: see `job_key`.
            scratch: the scratch folder of this process.
            site: the site's own folder.

        Raises:
            StoreRefused: they can't be written.
        """
        made = cls(scratch / key, site / "work" / key, site / "kept" / key)
        for folder in (made.bundle, made.models, made.outbox, made.temporary, made.work, made.kept):
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
        return made

    @property
    def bundle(self) -> Path:
        """The unpacked bundle, which no script writes."""
        return self.scratch / "bundle"

    @property
    def models(self) -> Path:
        """The host's downloads, and its own files on the way to the store."""
        return self.scratch / "models"

    @property
    def outbox(self) -> Path:
        """The folder in which the script leaves its update."""
        return self.scratch / "out"

    @property
    def temporary(self) -> Path:
        """The folder that the script sees as `/tmp`, in a sandbox that has one."""
        return self.scratch / "tmp"

    def remove(self) -> None:
        """Remove what doesn't stay. Idempotent."""
        shutil.rmtree(self.scratch, ignore_errors=True)
