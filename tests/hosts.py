"""An in-memory host, for tests of the client API that need no separate process."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpool.arrays import ParamsFormat, load_arrays, save_and_hash
from fedpool.client.hosts import Assignment, Waiting, Welcome


class MemoryHost:
    """An in-memory host: hands out assignments in turn, and records what it receives. None in the
    plan is a timeout.
    """

    def __init__(self, folder: Path, plan: Sequence[Assignment | None]) -> None:
        self.welcome = Welcome("job-1", "site-1", {"lr": 0.1})
        self.folder = folder
        self.plan = list(plan)
        self.timeouts: list[float | None] = []
        self.sent: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.closed = False

    def next(self, timeout: float | None) -> Assignment | None:
        self.timeouts.append(timeout)
        if not self.plan:
            return None
        assignment = self.plan.pop(0)
        if assignment is None:
            raise Waiting
        return assignment

    def params(self, assignment: Assignment, params_format: ParamsFormat) -> dict[str, Any]:
        return load_arrays(assignment.model, params_format) if assignment.model else {}

    def put(self, kind: str, **fields: Any) -> None:
        self.sent.append({"kind": kind, **fields})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        self.closed = True

    @property
    def updates(self) -> list[dict[str, Any]]:
        return [message for message in self.sent if message["kind"] == "update"]

    def params_sent(self, round: int = 0, params_format: ParamsFormat = "torch") -> dict[str, Any]:
        return load_arrays(self.folder / f"update-{round}", params_format)


class OneSite(MemoryHost):
    """A job with a single site, whose update is the next global model. A round's seed is its
    number.
    """

    def __init__(
        self, folder: Path, model: Mapping[str, Any], tasks: Sequence[str], config: Mapping[str, Any] | None = None
    ) -> None:
        host = host_of(folder, *[model] * len(tasks))
        plan = [a and replace(a, task=task, seed=a.round) for a, task in zip(host.plan, tasks, strict=True)]
        super().__init__(folder, plan)
        self.welcome = Welcome("job-1", "site-1", dict(config or {}))

    def put(self, kind: str, **fields: Any) -> None:
        super().put(kind, **fields)
        if kind == "update" and fields["num_params"]:
            for assignment in self.plan:
                assert assignment is not None
                shutil.copy(self.folder / f"update-{fields['round']}", str(assignment.model))


def host_of(folder: Path, *models: Mapping[str, Any], **fields: Any) -> MemoryHost:
    """A host that hands out one round for each global model."""
    plan = []
    for number, model in enumerate(models):
        with (folder / f"global-{number}").open("wb") as file:
            save_and_hash(file, model)
        plan.append(
            Assignment(
                number,
                len(models),
                model=str(folder / f"global-{number}"),
                update=str(folder / f"update-{number}"),
                kept=str(folder / "kept"),
                **fields,
            )
        )
    return MemoryHost(folder, plan)
