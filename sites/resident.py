"""A site outside a simulation: the jobs that it takes part in, and their warm sessions.

A job's first assignment starts its session. The session stays until the job ends (its `result.json`
exists), is cancelled, or has had no assignment for the idle timeout. A job does one assignment at a
time, in the order of its rounds.
"""

import threading
import time

from fedpool.errors import SiteError
from fedpool.sites.config import SiteConfig
from fedpool.sites.job_here import JobHere
from fedpool.sites.looks import Either
from fedpool.sites.output import LogLine
from fedpool.sites.scratch import Scratch
from fedpool.sites.turns import Turns

_IDLE_POLL_S = 3.0
"""How often to check whether a job without calls has ended: that happens after its last round."""

_CLOSE_GRACE_S = 15.0


class Resident:
    """The part of a site that lives between rounds. Thread-safe. On exit it kills the scripts.

    Args:
        config: the site's settings.
    """

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self._jobs: dict[str, JobHere] = {}
        self._lock = threading.Lock()
        self._turns = Turns(config.max_jobs)
        self._closed = threading.Event()
        self._scratch = Scratch(config.folder.absolute(), ".fedpool-")
        self._keeper = threading.Thread(target=self._keep_house, name="fedpool-resident", daemon=True)
        self._keeper.start()

    def __enter__(self) -> "Resident":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the site was stopped."""
        return self._closed.is_set()

    def perform(self, job_id: str, round: int, attempt: int = 0, *, stop: threading.Event, log: LogLine) -> bool:
        """Wait for a round's assignment, do it, and commit the outcome to the store.

        Blocks, so call it on a thread.

        Args:
            stop: set it to end the wait or the script at once.
            log: called with each line that the script prints.

        Returns: whether the assignment came; False if the job ended first, or went on without this
        site.

        Raises:
            SiteError: the script failed, was stopped or missed its deadline, or the job or the
                store does not fit this site.
        """
        with self._lock:
            if self.closed:
                raise SiteError(self.config.name, round, "the site was stopped")
            job = self._jobs.get(job_id)
            if job is None:
                job = self._jobs[job_id] = JobHere(
                    job_id, self.config.open_store(), self.config, self._scratch.path, self._turns
                )
            job.num_calls += 1
        try:
            return job.perform(round, attempt, stop=Either(stop, self._closed), log=log)
        finally:
            with self._lock:
                job.num_calls -= 1
                job.last_call = time.monotonic()

    def close(self) -> None:
        """Kill all scripts and remove all downloads. Idempotent."""
        with self._lock:
            self._closed.set()
            jobs = list(self._jobs.values())
            self._jobs.clear()
        for job in jobs:
            job.kill()
        for job in jobs:
            job.end()
        self._keeper.join(_CLOSE_GRACE_S)  # it may be ending a script, or waiting for the store
        self._scratch.remove()

    def _keep_house(self) -> None:
        """End the scripts of jobs that have ended or had no assignment for the idle timeout."""
        while not self._closed.wait(min(_IDLE_POLL_S, self.config.idle_timeout_s)):
            with self._lock:
                quiet = [job for job in self._jobs.values() if job.num_calls == 0]
            for job in quiet:
                over = time.monotonic() - job.last_call > self.config.idle_timeout_s or job.has_ended()
                with self._lock:
                    if not over or job.num_calls or self._jobs.get(job.job_id) is not job:
                        continue  # it has a call again
                    del self._jobs[job.job_id]
                job.end()
