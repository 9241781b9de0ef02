"""The filters of a job at a site: their code is fetched from the store by its hash, and runs
here if the site allows it.
"""

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
"""Modules are the process's: jobs load theirs one after the other."""


def load_filters(job: ClientJob, store: Store, allow: Permission) -> tuple[Filter, ...]:
    """The filters of a job, ready to run.

    Args:
        allow: is asked before code is run that came with the job, and refuses by raising.

    Raises:
        ConfigError: the code may not be run here, or cannot be imported.
        IntegrityError: it is not what its hash says, or does not have the filters that the job
            names.
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
                # A site outlives its jobs: the code of an earlier one may have modules of the same
                # names.
                make_room(code)
                load_code(code)
        try:
            return read_filters(job.filters)
        except RecipeError as error:
            raise IntegrityError(f"job {job.job_id} has filters that cannot be made here: {error}") from None
