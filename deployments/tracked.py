"""`track`: the experiment trackers that an environment gives to its jobs."""

from typing import ClassVar

from pydantic import Field, field_validator

from fedpool.errors import RecipeError
from fedpool.fields import Checked
from fedpool.tasks.track import parse_tracker


class Tracked(Checked):
    """The field `track`, checked when the environment is built."""

    coordinator_here: ClassVar[bool] = True
    """Whether this machine is also the coordinator, so that it needs the trackers' libraries."""

    track: tuple[str, ...] = Field(
        default=(),
        description='trackers that receive all scalars: "tensorboard", "tensorboard:FOLDER", "mlflow:URI"; see docs/tracking.md',
    )

    @field_validator("track", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("track")
    @classmethod
    def _trackers_are_there(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        trackers = [parse_tracker(text, here=cls.coordinator_here) for text in value]
        if len(set(trackers)) < len(trackers):
            raise RecipeError(f"track={list(value)} has the same tracker twice")
        if cls.coordinator_here:
            for tracker in trackers:
                tracker.check_installed()
        return tuple(str(tracker) for tracker in trackers)

    def tracking(self) -> dict[str, list[str]]:
        """The setting in an environment's record in `job.json`; empty if there are no trackers."""
        return {"track": list(self.track)} if self.track else {}
