"""A job's filters at a site: their code comes from the store, and runs if the site allows it."""

import threading

from fedpool.allowed_code import Permission, Request
from fedpool.errors import IntegrityError, RecipeError
from fedpool.filter_field import read_filters
from fedpool.filters import Filter
from fedpool.messages import ClientJob
from fedpool.paths import JobPaths
from fedpool.store import Store
from fedpool.stored_code import stored_code
from fedpool.user_code import is_loaded, load_code, make_room

_LOADING = threading.Lock()
"""Modules belong to the process, so jobs load theirs one after the other."""


def load_filters(job: ClientJob, store: Store, allow: Permission) -> tuple[Filter, ...]:
    """A job's filters, ready to run.

    Args:
        allow: called before any code of the job runs; raises to refuse.

    Raises:
        ConfigError: the code may not run here, or cannot be imported.
        IntegrityError: the code does not match its hash, or lacks the filters that the job names.
    """
    if not job.filters:
        return ()
    with _LOADING:
        if job.filter_code is not None:
            code = stored_code(job.job_id, store, job.filter_code)
            if not is_loaded(code):
                wanted = ", ".join(str(filter.get("type")) for filter in job.filters)
                where = store.full(JobPaths(job.job_id).code(code.sha256))
                allow(Request(job.job_id, wanted, code.modules, tuple(code.files), code.sha256, where))
                # A site outlives its jobs: the code of an earlier job may have modules with the
                # same names.
                make_room(code)
                load_code(code)
        try:
            return read_filters(job.filters)
        except RecipeError as error:
            raise IntegrityError(f"job {job.job_id} has filters that cannot be made here: {error}") from None
