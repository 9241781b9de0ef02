"""The client API's state machine: when each function may be called, and its effect."""

import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpool.arrays import ParamsFormat, load_arrays
from fedpool.client import keeping
from fedpool.client.hosts import Assignment, Host, Waiting
from fedpool.client.ranks import TorchrunHost, find_host
from fedpool.client.receiving import received_model
from fedpool.client.seeding import seed_everything
from fedpool.client.sending import number, update_message, write_params
from fedpool.errors import ClientError, RecipeError
from fedpool.model import NUM_STEPS, FLModel
from fedpool.paths import check_name

_ANSWERS = {
    "train": "send the trained model, flare.send(flare.FLModel(params=...))",
    "evaluate": "send the scores, flare.send(flare.FLModel(metrics=...)), or metrics={} if there is nothing to score",
    "submit_model": "send this site's own model, flare.send(flare.FLModel(params=...)), or metrics={} if it has none",
}
"""A script's answer to a round, by its task."""

_PATCHED = "call fit() or train() of the patched trainer, which sends"


@dataclass(frozen=True, slots=True)
class Patched:
    """A trainer that takes part in the rounds, and the options with which it was patched."""

    trainer: weakref.ref[Any]
    options: Mapping[str, Any]


class Client:
    """A client script's side of a session.

    Args:
        host: the source of assignments.
        params_format: the type of params; None gives torch tensors if the script has imported
            torch.
    """

    def __init__(self, host: Host, params_format: ParamsFormat | None = None) -> None:
        self._host = host
        self._format = params_format
        self._assignment: Assignment | None = None
        self._model: FLModel | None = None
        self._sent_round: int | None = None
        self._ended = False
        self._took_no_step = False
        self._looked_again = False
        self._asked_for_task = False
        self._told_of_evaluations = False
        self._told_of_repetition: FLModel | None = None
        self._looks_itself = False  # whether a rank above 0 calls is_running() itself
        self.patched_trainer: Patched | None = None
        """The trainer that was patched last; it sends the updates."""

    @property
    def site_name(self) -> str:
        """The site's name."""
        return self._host.welcome.site

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self._host.welcome.job_id

    @property
    def system_info(self) -> dict[str, str | int]:
        """Names of job and site, and the site's index among all sites."""
        welcome = self._host.welcome
        return {
            "job_id": welcome.job_id,
            "site_name": welcome.site,
            "site_index": welcome.site_index,
            "num_sites": welcome.num_sites,
        }

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the recipe and the site give this site (a copy)."""
        return dict(self._host.welcome.config)

    @property
    def task_name(self) -> str:
        """`train`, `evaluate` or `submit_model`."""
        if self._assignment is None:
            raise ClientError("there is no task yet: call this between flare.is_running() and flare.send()")
        self._asked_for_task = True
        return self._assignment.task

    @property
    def between_rounds(self) -> bool:
        """Whether a round was sent, and the next assignment not yet requested."""
        return self._assignment is None and self._sent_round is not None

    def join_ranks(self, rank: int) -> None:
        """From now on, act as one rank of the process group, which must exist; collective.

        For launchers that start the other ranks from within the script. Under torchrun, the only
        effect is that the ranks above 0 learn site, job and config now.
        """
        if not isinstance(self._host, TorchrunHost):
            self._host = TorchrunHost(rank, self._host)
        self._host.introduce()

    def is_running(self) -> bool:
        """Block until there is an assignment (True) or the job is over (False).

        A second call before the round is sent would return the same assignment forever, so it is
        refused. A script that has neither received nor asked for the task may call it twice, as in
        `if is_running(): while is_running(): ...`.

        Raises:
            ClientError: the script went through a round without sending.
        """
        if self._follows:  # follow rank 0, whether or not this rank has received and sent
            self._looks_itself = True
            return self._next(None)
        assignment = self._assignment
        if assignment is None:
            return self._next(None)
        if self._model is not None or self._asked_for_task or self._looked_again:
            raise ClientError(
                f"round {assignment.round} at {self.site_name}: send() was not called before the next flare.is_running(). "
                f"In a round of {assignment.task}, {_PATCHED if self.patched_trainer else _ANSWERS[assignment.task]}"
            )
        self._looked_again = True
        if isinstance(self._host, TorchrunHost):
            self._host.repeat()
        return True

    def receive(self, timeout: float | None = None) -> FLModel | None:
        """The round's model, always the same; None after `timeout` seconds or at the job's end."""
        if self._follows and not self._looks_itself:
            self._catch_up()
        if self._assignment is None:
            try:
                if not self._next(timeout):
                    return None
            except Waiting:
                return None
        assignment = self._assignment
        assert assignment is not None
        if self._model is None:
            self._model = received_model(self._host, assignment, self._params_format())
        return self._model

    def send(self, model: FLModel) -> None:
        """Send the round's update; see `fedpool.client.send`."""
        if not isinstance(model, FLModel):
            raise ClientError(
                f"send() takes a flare.FLModel, got {type(model).__name__}: wrap it as flare.FLModel(params=...)"
            )
        if self._follows:  # rank 0 sends for all
            if self._assignment is not None:
                self._answered(self._assignment)
            return
        if self._assignment is None or self._model is None:
            if self._assignment is None and self._sent_round is not None:
                raise ClientError(
                    f"round {self._sent_round} was already sent: call flare.is_running() for the next one"
                )
            raise ClientError("send() was called before receive(): call flare.receive() first, then train, then send")
        assignment = self._assignment
        message = update_message(assignment, model, self._model)
        if self._took_no_step:
            message["meta"][NUM_STEPS] = 0
        if model.params is not None and assignment.task != "evaluate":
            message |= write_params(assignment, model, self.config)
        elif model.params is not None and not self._told_of_evaluations:
            self._told_of_evaluations = True
            # Not a warning, because many training scripts ignore warnings.
            sys.stderr.write(
                f"fedpool: round {assignment.round} at {self.site_name} is an evaluation, so the parameters that were sent "
                "are ignored: check flare.is_evaluate() before you train and send only metrics, "
                "or give the recipe final_evaluation=False\n"
            )
        self._host.put("update", **message)
        self._answered(assignment)

    def keep(self, name: str, params: Mapping[str, Any]) -> None:
        """Keep tensors at this site; see `fedpool.client.keep`."""
        keeping.keep(self._in_round("keep", name), name, params)

    def kept(self, name: str, *, initial: bool = False) -> dict[str, Any] | None:
        """The tensors that this site has kept; see `fedpool.client.kept`."""
        assignment, params_format = self._in_round("kept", name), self._params_format()
        found = keeping.kept(assignment, name, params_format)
        if found is not None or not initial:
            return found
        if assignment.initial is None:
            return self._host.params(assignment, params_format)
        return load_arrays(assignment.initial, params_format)

    def keep_with_update(self, name: str, params: Mapping[str, Any]) -> None:
        """Keep tensors that are valid only if this round's update counts."""
        keeping.keep_with_update(self._in_round("keep", name), name, params)

    def kept_with_update(self, name: str) -> tuple[dict[str, Any] | None, float]:
        """The tensors kept with the last update that counted, and the factor on its difference."""
        return keeping.kept_with_update(self._in_round("kept", name), name, self._params_format())

    def count_nothing(self) -> None:
        """Give this round's update weight 0, because no step was taken."""
        self._took_no_step = True

    def _in_round(self, function: str, name: str) -> Assignment:
        try:
            check_name("name", name)
        except RecipeError as error:
            raise ClientError(str(error)) from None
        if self._assignment is None:
            raise ClientError(
                f"{function}() was called outside a round: call it between flare.is_running() and flare.send()"
            )
        return self._assignment

    def log(self, key: str, value: Any, **where: Any) -> None:
        """Send a scalar to the host."""
        self._host.put(
            "log", key=str(key), value=number(f"log({key!r})", value), where={k: str(v) for k, v in where.items()}
        )

    def note(self, key: str, text: Any) -> None:
        """Write a text to the site's log."""
        self._host.note(f"{key} = {text}")

    def shutdown(self) -> None:
        """Say goodbye to the host. For this script the job is over."""
        self._host.close()
        self._ended = True
        self._assignment = self._model = None

    def _answered(self, assignment: Assignment) -> None:
        self._sent_round = assignment.round
        self._assignment = self._model = None
        self._took_no_step = False

    def _next(self, timeout: float | None) -> bool:
        if self._ended:
            return False
        assignment = self._host.next(timeout)
        if assignment is not None and assignment == self._assignment:  # rank 0 has only asked again
            return True
        self._assignment, self._model = assignment, None
        self._looked_again = self._asked_for_task = False
        self._ended = self._assignment is None
        if self._assignment and self._assignment.seed is not None:
            seed_everything(self._assignment.seed)
        return not self._ended

    @property
    def _follows(self) -> bool:
        return isinstance(self._host, TorchrunHost) and self._host.follows

    def _catch_up(self) -> None:
        """For a rank that doesn't call is_running() itself: check whether rank 0 is in another
        round.
        """
        assert isinstance(self._host, TorchrunHost)
        if self._host.catch_up():
            self._assignment = self._model = None
        elif self._model is not None and self._model is not self._told_of_repetition:
            self._told_of_repetition = self._model
            sys.stderr.write(
                f"fedpool: receive() gives {self._host.name} the model of round {self._model.current_round} once more, because "
                "rank 0 has not asked for another: to stay in step, call flare.is_running() or flare.send() on every rank\n"
            )

    def _params_format(self) -> ParamsFormat:
        return self._format or ("torch" if "torch" in sys.modules else "numpy")


def start(rank: int | None, params_format: ParamsFormat | None) -> Client:
    """Connect this process to its host."""
    if params_format not in (None, "torch", "numpy"):
        raise ClientError(f'params_format must be "torch" or "numpy", got {params_format!r}')
    return Client(find_host(rank), params_format)
