"""What every `Desk` does, whatever the implementation. The coordinator's side is always a real
Prefect server.

To test another implementation, add it to `DESKS`.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Pending

from fedpool.deployments.prefect_desk import Counter, Mark, open_desk
from fedpool.deployments.server import free_port
from fedpool.errors import ConfigError, ServerError, Unreachable
from fedpool.sites.desk import SITE_ROUND, Desk, Phase, Piece, Report

Open = Callable[[str], AbstractAsyncContextManager[Desk]]

PARAMETERS = {"job_id": "j", "site": "s", "round": 0, "attempt": 0, "store": "/nowhere"}


@asynccontextmanager
async def prefect_desk(site: str) -> AsyncIterator[Desk]:
    async with open_desk(Counter(site, site, site, heartbeat_s=30, template={})) as desk:
        yield desk


DESKS: dict[str, Open] = {"prefect": prefect_desk}


@pytest.fixture(params=list(DESKS))
def opened(request: pytest.FixtureRequest, prefect_api: str) -> Open:
    """Opens a site's desk, as one of the site's processes does."""
    return DESKS[request.param]


@pytest.fixture
def site() -> str:
    """A site that no other test uses."""
    return f"site-{uuid4().hex[:8]}"


class Coordinator:
    """The other side of the desk."""

    def __init__(self, client: PrefectClient, site: str) -> None:
        self._client = client
        self._site = site

    async def ask(self, name: str = "asked", deployment: str | None = None) -> UUID:
        found = await self._client.read_deployment_by_name(deployment or f"{SITE_ROUND}/{self._site}")
        run = await self._client.create_flow_run_from_deployment(found.id, name=name, parameters=PARAMETERS)
        return run.id

    async def run(self, run: UUID) -> FlowRun:
        return await self._client.read_flow_run(run)

    async def state(self, run: UUID) -> State[Any]:
        state = (await self.run(run)).state
        assert state is not None
        return state

    async def set(self, run: UUID, kind: StateType) -> None:
        await self._client.set_flow_run_state(run, State(type=kind, message="by hand"), force=True)

    async def delete(self, run: UUID) -> None:
        await self._client.delete_flow_run(run)

    async def online(self) -> list[str]:
        return [worker.name for worker in await self._client.read_workers_for_work_pool(self._site)]

    async def lines(self, run: UUID, count: int) -> list[str]:
        """The logged lines, once there are `count` of them: they are sent in batches."""
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        while len(found := await self._client.read_logs(wanted)) < count:  # noqa: ASYNC110  # another process writes them
            await asyncio.sleep(0.1)
        return [log.message for log in found]


@flow(name="wanted-by-someone")
def other_flow() -> None:
    """Never runs."""


def at_desk(
    opened: Open, site: str, work: Callable[[Desk, Coordinator], Awaitable[None]], *, attend: bool = True
) -> None:
    """Run `work` at a site's desk, once the site has made itself known."""

    async def run() -> None:
        async with get_client() as client, opened(site) as desk:
            if attend:
                assert (await desk.attend()).new
            await work(desk, Coordinator(client, site))
            await desk.leave()

    asyncio.run(run())


async def taken(desk: Desk, coordinator: Coordinator) -> Piece:
    """A piece that this process has taken."""
    await coordinator.ask()
    (piece,) = await desk.next()
    assert await desk.report(piece, Report(Phase.TAKEN))
    return piece


def test_a_site_is_known_and_online_from_its_first_sign_of_life_until_it_leaves(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        assert await coordinator.online() == [site]
        again = await desk.attend()
        assert not again.new
        assert abs(again.clock_ahead_s) < 60
        await desk.leave()
        assert await coordinator.online() == []
        await desk.leave()  # harmless

    at_desk(opened, site, work)


def test_before_a_site_has_made_itself_known_nothing_is_offered_to_it(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        assert list(await desk.next()) == []

    at_desk(opened, site, work, attend=False)


def test_a_second_process_of_a_site_is_refused_while_the_first_is_there(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        async with opened(site) as second:
            with pytest.raises(ConfigError, match=f"site '{site}' is already served by"):
                await second.attend()
        assert not (await desk.attend()).new
        await desk.leave()
        async with opened(site) as third:
            assert (await third.attend()).new
            await third.leave()

    at_desk(opened, site, work)


def test_what_is_asked_of_a_site_is_offered_to_it_as_it_was_asked_until_it_is_taken(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        assert list(await desk.next()) == []
        run = await coordinator.ask("job round 3 here")
        (piece,) = await desk.next()
        assert piece == Piece(run, "job round 3 here", SITE_ROUND, PARAMETERS)
        assert list(await desk.next()) == [piece]
        assert await desk.report(piece, Report(Phase.TAKEN))
        assert list(await desk.next()) == []
        assert (await coordinator.state(run)).is_pending()

    at_desk(opened, site, work)


def test_other_work_is_offered_under_its_own_name(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        async with get_client() as client:
            await client.create_deployment(await client.create_flow(other_flow), site, work_pool_name=site)
        await coordinator.ask(deployment=f"wanted-by-someone/{site}")
        (piece,) = await desk.next()
        assert piece.kind == "wanted-by-someone"

    at_desk(opened, site, work)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase.ended])
def test_each_end_is_seen_on_the_other_side_with_its_message(opened: Open, site: str, phase: Phase) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        piece = await taken(desk, coordinator)
        assert await desk.report(piece, Report(Phase.STARTED))
        assert (await coordinator.state(piece.id)).is_running()
        assert await desk.report(piece, Report(phase, f"this is how: {phase}"))
        state = await coordinator.state(piece.id)
        assert (str(state.name).lower(), state.message) == (str(phase), f"this is how: {phase}")
        assert state.is_final()

    at_desk(opened, site, work)


def test_a_piece_is_taken_once(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        await coordinator.ask()
        (piece,) = await desk.next()
        await coordinator.set(piece.id, StateType.RUNNING)  # by someone else
        assert not await desk.report(piece, Report(Phase.TAKEN))
        assert (await coordinator.state(piece.id)).message == "by hand"

    at_desk(opened, site, work)


def test_a_piece_whose_taking_was_answered_by_nobody_is_taken_all_the_same(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        piece = await taken(desk, coordinator)
        assert await desk.report(piece, Report(Phase.TAKEN))  # the same report again

    at_desk(opened, site, work)


@pytest.mark.parametrize("kind", [StateType.CANCELLED, StateType.FAILED])
def test_an_end_that_somebody_else_has_reported_stays_as_it_is(opened: Open, site: str, kind: StateType) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        piece = await taken(desk, coordinator)
        await coordinator.set(piece.id, kind)
        assert not await desk.report(piece, Report(Phase.CRASHED, "too late"))
        assert (await coordinator.state(piece.id)).message == "by hand"

    at_desk(opened, site, work)


def test_a_piece_that_is_being_cancelled_is_not_begun(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        piece = await taken(desk, coordinator)
        await coordinator.set(piece.id, StateType.CANCELLING)
        assert not await desk.report(piece, Report(Phase.STARTED))
        assert (await coordinator.state(piece.id)).message == "by hand"

    at_desk(opened, site, work)


def test_a_piece_that_was_deleted_cannot_be_taken_but_its_work_may_end(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        begun = await taken(desk, coordinator)
        await coordinator.delete(begun.id)
        assert await desk.report(begun, Report(Phase.STARTED))
        assert await desk.report(begun, Report(Phase.COMPLETED, "done"))
        await coordinator.ask()
        (gone,) = await desk.next()
        await coordinator.delete(gone.id)
        assert not await desk.report(gone, Report(Phase.TAKEN))

    at_desk(opened, site, work)


def test_of_some_pieces_those_that_were_cancelled_are_told(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        pieces = [await taken(desk, coordinator) for _ in range(3)]
        ids = [piece.id for piece in pieces]
        assert await desk.cancelled(ids) == frozenset()
        await coordinator.set(ids[0], StateType.CANCELLING)
        await coordinator.set(ids[1], StateType.CANCELLED)
        assert await desk.cancelled(ids) == frozenset(ids[:2])
        assert await desk.cancelled(ids[2:]) == frozenset()
        assert await desk.cancelled([]) == frozenset()
        assert await desk.report(pieces[0], Report(Phase.CANCELLED, "the run was cancelled"))
        assert (await coordinator.state(ids[0])).is_cancelled()

    at_desk(opened, site, work)


def test_lines_are_logged_from_any_thread(opened: Open, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        piece = await taken(desk, coordinator)
        desk.log(piece, "from here, 100 % as it is")
        thread = threading.Thread(target=lambda: desk.log(piece, "from there", error=True))
        thread.start()
        thread.join()
        lines = await asyncio.wait_for(coordinator.lines(piece.id, 2), 60)
        assert lines == ["from here, 100 % as it is", "from there"]

    at_desk(opened, site, work)


def test_what_a_site_left_behind_is_found_whatever_became_of_its_state_and_nothing_else(
    opened: Open, site: str
) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        pending, running, cancelling, done, held = [await taken(desk, coordinator) for _ in range(5)]
        await desk.report(running, Report(Phase.STARTED))
        await desk.report(done, Report(Phase.COMPLETED))
        await coordinator.set(cancelling.id, StateType.CANCELLING)  # with its own message
        untouched = await coordinator.ask("not taken")
        by_others = await coordinator.ask("by others")
        await coordinator.set(by_others, StateType.RUNNING)
        left = await desk.left_behind([held.id])
        assert {piece.id for piece in left} == {pending.id, running.id, cancelling.id}
        assert pending in left
        await desk.leave()
        async with opened(site) as later:  # the site's next process
            assert (await later.attend()).new
            assert {piece.id for piece in await later.left_behind([])} == {
                *(piece.id for piece in left),
                held.id,
            }
            for piece in left:
                phase = Phase.CANCELLED if piece == cancelling else Phase.CRASHED
                assert await later.report(piece, Report(phase, "lost"))
            assert [piece.id for piece in await later.left_behind([])] == [held.id]
            assert [piece.id for piece in await later.next()] == [untouched]
            await later.leave()

    at_desk(opened, site, work)


@pytest.mark.parametrize("opened", list(DESKS))
def test_a_desk_that_does_not_answer_says_so(opened: str, site: str) -> None:
    async def run() -> None:
        async with DESKS[opened](site) as desk:
            piece = Piece(uuid4(), "any", SITE_ROUND, PARAMETERS)
            for request in (
                desk.attend(),
                desk.next(),
                desk.report(piece, Report(Phase.TAKEN)),
                desk.report(piece, Report(Phase.COMPLETED)),
                desk.cancelled([piece.id]),
                desk.left_behind([]),
            ):
                with pytest.raises(Unreachable, match="unreachable"):
                    await request
            await desk.leave()  # it was never there

    api = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: api, PREFECT_CLIENT_MAX_RETRIES: 0}):
        asyncio.run(run())


def test_on_a_prefect_server_a_run_is_marked_with_who_has_taken_it_and_strange_marks_are_left_alone(
    prefect_api: str, site: str
) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        piece = await taken(desk, coordinator)
        run = await coordinator.run(piece.id)
        mark = Mark.of(run)
        assert mark is not None and mark.site == site and str(mark) == run.infrastructure_pid
        async with get_client() as client:
            others = json.dumps({"site": "another", "host": "h", "pid": 1, "token": "t"})
            for strange in (others, "host:123", "[1]", "{}"):
                await client.update_flow_run(piece.id, infrastructure_pid=strange)
                assert list(await desk.left_behind([])) == []

    at_desk(prefect_desk, site, work)


def test_on_a_prefect_server_what_a_worker_of_an_earlier_version_left_behind_is_found(
    prefect_api: str, site: str
) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        run = await coordinator.ask()
        async with get_client() as client:
            await client.set_flow_run_state(run, Pending(message=f"in the hands of worker {site}"))
        assert [piece.id for piece in await desk.left_behind([])] == [run]

    at_desk(prefect_desk, site, work)


def test_a_prefect_server_that_refuses_is_no_server_to_wait_for(prefect_api: str, site: str) -> None:
    async def work(desk: Desk, coordinator: Coordinator) -> None:
        with pytest.raises(ServerError, match="refused the request: Client error '404") as refused:
            await desk.attend()
        assert not isinstance(refused.value, Unreachable)

    with temporary_settings({PREFECT_API_URL: prefect_api.replace("/api", "/no-api")}):
        asyncio.run(_refused(site, work))


async def _refused(site: str, work: Callable[[Desk, Coordinator], Awaitable[None]]) -> None:
    async with get_client() as client, prefect_desk(site) as desk:
        await work(desk, Coordinator(client, site))
