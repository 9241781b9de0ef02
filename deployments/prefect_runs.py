"""Pieces of work as Prefect flow runs: `Reports` for the process that does one.

See `fedpool.sites.desk`. Prefect's own engine would do the same at a higher price: it uses a
client, a web socket, a thread and an event loop for every run, and makes requests that a site does
not need.
"""

import contextvars
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound, PrefectException

from fedpool.errors import ServerError, Unreachable
from fedpool.sites.desk import Piece, Report
from fedpool.tasks.prefect_internals import run_logger
from fedpool.tasks.run_states import report_state, state_of

_PAGE = 200


class PrefectRuns:
    """Reports on pieces of work to a Prefect server.

    Args:
        client: an open client.
    """

    name = "the Prefect server"

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        self._flows: dict[UUID, str] = {}
        self._context = contextvars.copy_context()  # a run's logger finds Prefect's settings in it, on any thread

    async def piece(self, run_id: UUID) -> Piece:
        """The run as a piece of work; its kind is the name of its flow."""
        with self.answers():
            return await self.piece_of(await self._client.read_flow_run(run_id))

    async def piece_of(self, run: FlowRun) -> Piece:
        """The same, for a run that was already read."""
        if run.flow_id not in self._flows:
            self._flows[run.flow_id] = (await self._client.read_flow(run.flow_id)).name
        return Piece(run.id, run.name, self._flows[run.flow_id], run.parameters)

    async def report(self, piece: Piece, report: Report) -> bool:
        """See `Reports.report`. For a deleted run it is True: the job may still use the work."""
        state = state_of(report)
        with self.answers():
            try:
                answer = await report_state(self._client, state, piece.id)
            except ObjectNotFound:
                return True
        return answer is not None and answer.type == state.type

    def log(self, piece: Piece, line: str, *, error: bool = False) -> None:
        """See `Reports.log`."""
        logger = run_logger(piece.id, piece.name, piece.kind)
        self._context.copy().run(logger.error if error else logger.info, "%s", line)

    async def cancelled(self, pieces: Collection[UUID]) -> frozenset[UUID]:
        """See `Reports.cancelled`."""
        ids, found = list(pieces), set[UUID]()
        with self.answers():
            for start in range(0, len(ids), _PAGE):
                page = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + _PAGE]))
                for run in await self._client.read_flow_runs(flow_run_filter=page, limit=_PAGE):
                    if run.state is not None and (run.state.is_cancelling() or run.state.is_cancelled()):
                        found.add(run.id)
        return frozenset(found)

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Turns errors of requests to the server into `Unreachable` or another `ServerError`."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= 500:
                raise Unreachable(f"{self.name} is unreachable: {error}") from error
            raise ServerError(f"{self.name} at {self._client.api_url} refused the request: {error}") from error
        except httpx.TransportError as error:
            raise Unreachable(f"{self.name} is unreachable: {str(error) or type(error).__name__}") from error
        except PrefectException as error:  # such as a missing object
            raise ServerError(f"{self.name} at {self._client.api_url} refused the request: {error}") from error
