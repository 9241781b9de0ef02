"""Writes runs as TensorBoard event files with tensorboardX, a folder per run. Runs in its own
process.

A run's file is open only while a batch is appended, so a thousand sites don't need a thousand open
files. Nothing is synced to disk. After a failure, such as a full disk, the file may end in the
middle of an event; the next batch starts a new file.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import text as text_summary

from fedpool.tasks.tracker_process import SERVER_RUN, Row, Writer


class TensorBoardWriter(Writer):
    """Writes event files below a folder."""

    def __init__(self) -> None:
        self._folder = Path()
        self._files: dict[str, Path] = {}
        self._num_files = 0

    def begin(self, target: str, job_id: str, name: str, params: Mapping[str, str]) -> None:
        self._folder = Path(target)
        table = "\n".join(["|field|value|", "|---|---|", *(f"|{key}|{_cell(value)}|" for key, value in params.items())])
        self._append(SERVER_RUN, [_text("recipe", f"{name}, job {job_id}\n\n{table}", 0)])

    def scalars(self, run: str, rows: Sequence[Row]) -> None:
        self._append(
            run,
            [
                Event(wall_time=when, step=step, summary=Summary(value=[Summary.Value(tag=key, simple_value=value)]))
                for key, value, step, when in rows
            ],
        )

    def end(self, status: str, texts: Mapping[str, str]) -> None:
        lines = [f"{status}\n", *(f"- {name}: {_cell(value)}" for name, value in texts.items())]
        self._append(SERVER_RUN, [_text("result", "\n".join(lines), 0)])

    def _append(self, run: str, events: Sequence[Any]) -> None:
        known = self._files.get(run)
        path = known or self._new_file(run)
        first = [] if known else [Event(wall_time=time.time(), file_version="brain.Event:2")]
        data = b"".join(_record(event.SerializeToString()) for event in (*first, *events))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(data)
        except OSError:
            self._files.pop(run, None)
            raise
        self._files[run] = path

    def _new_file(self, run: str) -> Path:
        """A name that no other process uses, so a resumed job adds files to its runs."""
        self._num_files += 1
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{self._num_files}"
        return self._folder / run / name


def make_writer() -> Writer:
    """See `fedpool.tasks.tracker_process`."""
    return TensorBoardWriter()


def _record(data: bytes) -> bytes:
    """A record of an event file: length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _text(tag: str, text: str, step: int) -> Any:
    return Event(wall_time=time.time(), step=step, summary=text_summary(tag, text))


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
