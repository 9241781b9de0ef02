"""Writes runs to MLflow: an experiment per recipe name, with a run per job and child runs per site.

Runs are found again by their tags, so a resumed job continues the same ones. Runs in a separate
process.
"""

import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence

# Before importing MLflow: it would send telemetry, and try an unreachable server for minutes, but
# we retry ourselves.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fedpool.tasks.tracker_process import SERVER_RUN, Refused, Row, Writer

_JOB, _SITE, _PARENT = "fedpool.job_id", "fedpool.site", "mlflow.parentRunId"
_STATUS = {"COMPLETED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED"}
_MAX_METRICS, _MAX_PARAMS = 1000, 100
"""Per request."""
_MAX_VALUE, _MAX_TAG, _MAX_KEY = 500, 5000, 250
"""Characters, within the limits of all of MLflow's stores."""
_UNFIT = re.compile(r"[^\w\-. /]", re.ASCII)


class MLflowWriter(Writer):
    """Writes the runs of an experiment."""

    def __init__(self) -> None:
        self._client: MlflowClient | None = None
        self._begun: tuple[str, str, str, Mapping[str, str]] = ("", "", "", {})
        self._experiment = ""
        self._runs: dict[str, str] = {}

    def begin(self, target: str, job_id: str, name: str, params: Mapping[str, str]) -> None:
        self._begun = target, job_id, name, params
        _asking(self._run, SERVER_RUN)

    def scalars(self, run: str, rows: Sequence[Row]) -> None:
        metrics = [Metric(_key(key), value, int(when * 1000), step) for key, value, step, when in rows]
        for start in range(0, len(metrics), _MAX_METRICS):
            _asking(self._log, run, metrics[start : start + _MAX_METRICS])

    def end(self, status: str, texts: Mapping[str, str]) -> None:
        _asking(self._end, status, texts)

    def _log(self, run: str, metrics: Sequence[Metric]) -> None:
        self._there().log_batch(self._run(run), metrics=metrics)

    def _end(self, status: str, texts: Mapping[str, str]) -> None:
        client = self._there()
        tags = [RunTag(f"fedpool.{name}", value[:_MAX_TAG]) for name, value in texts.items()]
        client.log_batch(self._run(SERVER_RUN), tags=[RunTag("fedpool.status", status), *tags])
        for run_id in self._runs.values():
            client.set_terminated(run_id, _STATUS[status])

    def _there(self) -> MlflowClient:
        """The client, once its store answers and has the experiment."""
        if self._client is None:
            target, _, name, _ = self._begun
            client = MlflowClient(target)
            found = client.get_experiment_by_name(name)
            self._experiment = client.create_experiment(name) if found is None else found.experiment_id
            self._client = client
        return self._client

    def _run(self, run: str) -> str:
        """The id of a run. On first use, the run is created or, if it exists, continued."""
        if run not in self._runs:
            client, job_id = self._there(), self._begun[1]
            wanted = f"tags.`{_JOB}` = '{job_id}' and tags.`{_SITE}` = '{run}'"
            found = client.search_runs([self._experiment], wanted, max_results=1)
            if found:
                client.update_run(found[0].info.run_id, status="RUNNING")
                self._runs[run] = found[0].info.run_id
            else:
                self._runs[run] = self._create(client, run)
        return self._runs[run]

    def _create(self, client: MlflowClient, run: str) -> str:
        _, job_id, _, params = self._begun
        tags = {_JOB: job_id, _SITE: run}
        if run != SERVER_RUN:
            tags[_PARENT] = self._run(SERVER_RUN)
        name = job_id if run == SERVER_RUN else f"{job_id} {run}"
        run_id: str = client.create_run(self._experiment, tags=tags, run_name=name).info.run_id
        fields = [Param(_key(key), value[:_MAX_VALUE]) for key, value in params.items()] if run == SERVER_RUN else []
        for start in range(0, len(fields), _MAX_PARAMS):
            client.log_batch(run_id, params=fields[start : start + _MAX_PARAMS])
        return run_id


def make_writer() -> Writer:
    """See `fedpool.tasks.tracker_process`."""
    return MLflowWriter()


def _asking(ask: Callable[..., object], *arguments: object) -> None:
    """Call a function; raise `Refused` if MLflow will never accept the request."""
    try:
        ask(*arguments)
    except MlflowException as error:
        if 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429):
            raise Refused(error.message) from error
        raise


def _key(text: str) -> str:
    """A name that MLflow accepts: like a normalised path, with a limited set of characters."""
    key = posixpath.normpath(_UNFIT.sub("_", text)).lstrip("./ ")[:_MAX_KEY].rstrip("/")
    return key or "_"
