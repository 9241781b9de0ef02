"""Reads the contents of trackers, using the trackers' own libraries."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Series = dict[str, list[tuple[int, float, float]]]
"""Name of a scalar -> step, value, and time in seconds since 1970, in the order in which they
were logged.
"""


def read_tensorboard(folder: Path) -> Series:
    """The scalars in a run's folder. TensorBoard keeps float32."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(each.step, each.value, each.wall_time) for each in events.Scalars(tag)] for tag in tags}


def read_texts(folder: Path) -> dict[str, str]:
    """The texts in a run's folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}


class MLflowStore:
    """An MLflow store, through its client."""

    def __init__(self, uri: str) -> None:
        from mlflow.tracking import MlflowClient  # importing it takes seconds

        self._client = MlflowClient(uri)

    def runs(self, experiment: str) -> dict[str, Any]:
        """Each site, or `server`, with its run."""
        found = self._client.get_experiment_by_name(experiment)
        assert found is not None
        runs = self._client.search_runs([found.experiment_id])
        by_site = {run.data.tags["fedpool.site"]: run for run in runs}
        assert len(by_site) == len(runs), "one run for each"
        return by_site

    def read(self, run: Any) -> Series:
        """The scalars of a run."""
        histories = {name: self._client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        return {
            name: [
                (each.step, each.value, each.timestamp / 1000) for each in sorted(history, key=lambda each: each.step)
            ]
            for name, history in histories.items()
        }
