"""`Tracking`: an observer that forwards events to an experiment tracker, in the background and in
order.

The tracker's library runs in a separate process (`fedpool.tasks.tracker_process`), because
importing it takes seconds, and writing would slow down the rounds. A thread feeds that process
through a pipe, so messages already sent are written even if this process is killed. A failure is
logged as one warning in the job's log.
"""

import asyncio
import contextvars
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from prefect.logging import get_run_logger

from fedpool.errors import FedpoolError
from fedpool.paths import JobPaths
from fedpool.sites.scalars import Scalar
from fedpool.tasks.observer import Beginning, Ending, Observer, ReadScalars
from fedpool.tasks.record import RoundRecord, of_global_models
from fedpool.tasks.track import Tracker, parse_tracker
from fedpool.tasks.tracker_process import DONE, GRACE_S, SERVER_RUN, WARNING, Row

_MODULE = "fedpool.tasks.tracker_process"
_DRAIN_S = 300.0
"""How long a job's end waits for a busy tracker; a failing one gives up much sooner."""
_FATAL = "Fatal Python error"
_MAX_WAITING = 20_000
"""Messages that wait while a tracker's process doesn't read them."""

_Message = dict[str, Any]


class Tracking(Observer):
    """One tracker of one job.

    Args:
        tracker: the tracker to write to.
    """

    __slots__ = ("_feeder", "_key_metric", "_log", "_process", "_queue", "_reader", "_tracker", "_warned")

    wants_scalars = True

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._queue: queue.SimpleQueue[Callable[[], _Message] | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._feeder: threading.Thread | None = None
        self._reader: threading.Thread | None = None
        self._key_metric = ""
        self._warned = False
        self._log: Any = None

    def begun(self, beginning: Beginning) -> None:
        self._log = get_run_logger()
        self._key_metric = beginning.key_metric
        if (why := self._tracker.missing()) is not None:
            self._warn(why)
            return
        self._feeder = _thread("feed", self._feed)
        self._put(lambda: _begin(beginning, self._tracker))

    def logged(self, site: str, round: int, read: ReadScalars) -> None:
        self._put(lambda: _message(_run_of(site), [_row(scalar, round) for scalar in read()]))

    def committed(self, record: RoundRecord) -> None:
        now = time.time()
        for run, values in _scores(record, self._key_metric):
            self._put(partial(_message, run, [(key, value, record.round, now) for key, value in values.items()]))

    def ended(self, ending: Ending) -> None:
        self._put(lambda: _end(ending))

    def interrupted(self, ending: Ending) -> None:
        self._put(lambda: _end(ending))
        self._queue.put(None)
        if self._feeder is not None:
            self._feeder.join(1.0)  # the process continues with the messages in its pipe

    async def finish(self) -> None:
        await asyncio.to_thread(self._finish)

    def _finish(self) -> None:
        if self._feeder is None:
            return
        self._queue.put(None)
        deadline = time.monotonic() + _DRAIN_S
        self._feeder.join(_DRAIN_S)
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._warn(f"it had not written everything {_DRAIN_S:g} s after the end of the job, so it was killed")
        if self._reader is not None:
            self._reader.join(GRACE_S)

    def _put(self, make: Callable[[], _Message]) -> None:
        if self._feeder is None or not self._feeder.is_alive():
            return
        if self._queue.qsize() < _MAX_WAITING:
            self._queue.put(make)
        else:
            self._warn(f"{_MAX_WAITING} messages are waiting for it: new messages are lost")

    def _feed(self) -> None:
        """Forward messages until there are no more; the end of its input then ends the process."""
        try:
            self._process = process = subprocess.Popen(
                # -P: files in the current folder must not shadow a library.
                [sys.executable, "-P", "-m", _MODULE, self._tracker.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the job, and this process still has to write the result
            )
            assert process.stdin is not None
            self._reader = _thread("read", self._listen)
            with process.stdin as pipe:
                while (make := self._queue.get()) is not None:
                    try:
                        message = make()
                    except FedpoolError as error:  # a site's scalars could not be read
                        self._log.warning("%s", error)
                        continue
                    pipe.write(json.dumps(message).encode() + b"\n")
                    pipe.flush()
        except BrokenPipeError:
            return  # it has ended, or is about to: `_listen` says why
        except OSError as error:  # it could not start
            self._warn(str(error))

    def _listen(self) -> None:
        """Log the process's warnings until it ends, and why if it ends too early."""
        assert self._process is not None and self._process.stdout is not None
        last, is_done, is_fatal = "", False, False
        with self._process.stdout as said:
            for line in said:
                text = line.decode(errors="replace").strip()
                if text.startswith(WARNING):
                    self._warn(text.removeprefix(WARNING))
                is_done = is_done or text == DONE
                if text and not is_fatal:  # Python's own last words are followed by the stacks of all threads
                    last, is_fatal = text, text.startswith(_FATAL)
        code = self._process.wait()
        if code != 0 or not is_done:
            self._warn(_too_early(code, last))

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            self._log.warning("tracker %s: %s", self._tracker, why)


def trackings(track: Sequence[str] | None) -> list[Tracking]:
    """The observers for a job's trackers.

    Raises:
        RecipeError: a tracker is unknown.
    """
    return [Tracking(parse_tracker(text, here=False)) for text in track or ()]


def _too_early(code: int, last: str) -> str:
    """How a tracker's process ended before it had written everything.

    Args:
        last: the last line of its output; may be empty.
    """
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"its process {how} before it had written everything" + (f": {last}" if last else ", without a message")


def _thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """A started thread whose loggers find their Prefect run and settings."""
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), name=f"fedpool-tracker-{name}", daemon=True)
    thread.start()
    return thread


def _begin(beginning: Beginning, tracker: Tracker) -> _Message:
    target = tracker.target
    if tracker.kind == "tensorboard":
        paths = JobPaths(beginning.job_id)
        target = f"{target}/{beginning.job_id}" if target else beginning.store.full(paths.tensorboard)
    return {
        "do": "begin",
        "target": target,
        "job_id": beginning.job_id,
        "name": beginning.name,
        "params": {name: _text(value) for name, value in beginning.fields.items() if value is not None},
    }


def _message(run: str, rows: Sequence[Row]) -> _Message:
    """Rows of name, value, step and time for a run."""
    return {"do": "scalars", "run": run, "rows": rows}


def _row(scalar: Scalar, round: int) -> Row:
    """A site's scalar; without a step of its own, its step is the round."""
    return scalar.key, scalar.value, round if scalar.step is None else scalar.step, scalar.time


def _end(ending: Ending) -> _Message:
    result = ending.result
    said = {
        "stopped_by": result.stopped_by,
        "error": result.error,
        "best_round": result.best.round,
        "best_model": result.best.path,
        "final_model": result.final.path,
    }
    texts = {name: _text(value) for name, value in said.items() if value is not None}
    return {"do": "end", "status": result.status, "texts": texts}


def _scores(record: RoundRecord, key_metric: str) -> Iterator[tuple[str, dict[str, float]]]:
    """A round's values for each run: means over sites for the server's, a site's own scores."""
    is_of_global = bool(of_global_models([record]))
    means = {**record.logged, **record.metrics} if is_of_global else dict(record.logged)
    if is_of_global and key_metric in record.metrics:
        means["key_metric"] = record.metrics[key_metric]
    yield SERVER_RUN, means
    if is_of_global:
        for entry in record.accepted:
            yield _run_of(entry.site), {f"global_model/{k}": v for k, v in entry.metrics.items() if v is not None}


def _run_of(site: str) -> str:
    """The name of a site's run, different from the server's: sites' names have no spaces."""
    return f"{site} (site)" if site == SERVER_RUN else site


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
