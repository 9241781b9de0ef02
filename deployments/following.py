"""Follows a job that runs elsewhere to its end. The store has the truth, Prefect knows its run.

It does not wait for ever for a run that Prefect no longer knows, or whose state never changes
because its process is gone. If the store is local, a running job holds its folder; otherwise a
coordinator notices within seconds that its run is gone.
"""

import asyncio
import re
import time
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound

from fedpool.errors import JobCancelled, JobFailed, ServerError, StoreError
from fedpool.flows.staging import num_committed
from fedpool.paths import JobPaths
from fedpool.store import Store

_POLL_S = 0.3
_API_POLL_S = 2.0
_API_PATIENCE_S = 600.0
"""How long the Prefect API may be unreachable while a job is followed."""
_RESULT_PATIENCE_S = 20.0
"""How long Prefect may lag behind the store at the end of a job."""
_ABANDONED_S = 6.0
"""Time until a free folder counts as abandoned: its coordinator may have just let go of it."""
_UNSEEN_S = 60.0
"""The same if it is unknown whether the folder is held."""


async def follow(client: PrefectClient, run_id: UUID, store: Store, job_id: str) -> None:
    """Wait for a job's flow run to end.

    Raises:
        JobFailed: the run ended without a result, or no process runs it any more.
        JobCancelled: the job was cancelled before it began.
        ServerError: the server was unreachable for too long.
    """
    await _Follower(client, run_id, store, job_id).follow()


async def cancel_run(client: PrefectClient, run_id: UUID) -> None:
    """Cancel a job's run. Does nothing if it has ended or is gone.

    A pending run is cancelled at once, because one that is in state Cancelling when its process
    starts stays so for ever (Prefect 3.8.8). A coordinator that has just started notices either
    state.
    """
    try:
        run = await client.read_flow_run(run_id)
        pending = run.state is not None and run.state.is_pending()
        await client.set_flow_run_state(run_id, State(type=StateType.CANCELLED if pending else StateType.CANCELLING))
    except ObjectNotFound:
        return


class _Follower:
    def __init__(self, client: PrefectClient, run_id: UUID, store: Store, job_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._store = store
        self._job_id = job_id
        self._was_held = False
        self._abandoned_since: float | None = None

    async def follow(self) -> None:
        asked = answered = time.monotonic()
        over_since: float | None = None
        while True:
            # The store shows when the job is over. The server is asked now and then whether the run
            # was lost.
            now = time.monotonic()
            if over_since is None and await self._is_over():
                over_since = now
            if (over_since == now) or now - asked >= _API_POLL_S:
                asked = now
                try:
                    ended = await self._look(over=over_since is not None)
                    answered = time.monotonic()
                except httpx.HTTPError as error:
                    ended = False
                    if over_since is None and time.monotonic() - answered > _API_PATIENCE_S:
                        raise ServerError(
                            f"the Prefect server is unreachable: {error}. {self._how_to_go_on()}"
                        ) from error
                if ended or (over_since is not None and time.monotonic() - over_since > _RESULT_PATIENCE_S):
                    return
            await asyncio.sleep(_POLL_S)

    async def _is_over(self) -> bool:
        try:
            return await asyncio.to_thread(self._store.exists, JobPaths(self._job_id).result)
        except StoreError:  # no answer
            return False

    async def _look(self, *, over: bool) -> bool:
        """Whether Prefect's run has ended as well; raises if there will be no result."""
        try:
            state = (await self._client.read_flow_run(self._run_id)).state
        except ObjectNotFound:
            state = None
            cause = "its run is gone from the Prefect server: it was deleted, or the server lost its database"
        else:
            if state is not None and state.is_final():
                return over or await self._leave(state)
            cause = f"no process runs it any more, although Prefect shows its run as {state.name if state else 'new'}"
        if over:
            return state is None
        if await self._is_abandoned(state):
            if await self._is_over():
                return state is None
            if state is not None and state.is_cancelling():
                await self._client.set_flow_run_state(self._run_id, State(type=StateType.CANCELLED), force=True)
                raise JobCancelled(f"job {self._job_id} was cancelled before it began. {self._how_to_go_on()}")
            raise self._lost(cause)
        return False

    async def _leave(self, state: State[object]) -> bool:
        """Wait for the result after the run has ended; raises if there will be none."""
        since = time.monotonic()
        while not await self._is_over():
            # A coordinator that was cancelled from outside writes its result only afterwards.
            held = await asyncio.to_thread(self._store.is_held, self._job_id)
            may_come = state.is_cancelled() and held is None and time.monotonic() - since < _RESULT_PATIENCE_S
            if not held and not may_come:
                if await self._is_over():
                    return True
                if state.is_cancelled():
                    raise JobCancelled(f"job {self._job_id} was cancelled before it began. {self._how_to_go_on()}")
                if said := re.search(rf"job {re.escape(self._job_id)} failed: .*", state.message or "", re.DOTALL):
                    raise JobFailed(said[0])  # the store refused its result; this was the coordinator's last message
                message = f": {state.message}" if state.message else ""
                raise self._lost(f"its run ended without a result ({state.name}{message}): see its log in the UI")
            await asyncio.sleep(_POLL_S)
        return True

    async def _is_abandoned(self, state: State[object] | None) -> bool:
        """Whether no process has worked on the job for a while."""
        held = await asyncio.to_thread(self._store.is_held, self._job_id)
        self._was_held = self._was_held or held is True
        # A run that waits for its coordinator, or has just begun, does not hold the folder yet.
        expected = state is not None and not state.is_cancelling() and not self._was_held
        if held is True or expected or (held is None and state is not None and not state.is_cancelling()):
            self._abandoned_since = None
            return False
        now = time.monotonic()
        if self._abandoned_since is None:
            self._abandoned_since = now
        return now - self._abandoned_since >= (_UNSEEN_S if held is None else _ABANDONED_S)

    def _lost(self, cause: str) -> JobFailed:
        try:
            count = num_committed(self._store, self._job_id)
            done = f"after {count} committed rounds" if count else "before its first commit"
        except StoreError:  # no answer; the cause matters more
            done = "after some rounds"
        return JobFailed(f"job {self._job_id} was lost {done}: {cause}. {self._how_to_go_on()}")

    def _how_to_go_on(self) -> str:
        return (
            f"Resume it with recipe.execute(env, resume={self._job_id!r}) or `fedpool job resume {self._job_id}`: "
            "committed rounds are kept"
        )
