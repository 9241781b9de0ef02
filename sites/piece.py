"""Checks a piece of work, has the resident site do it, and reports to the desk."""

import asyncio
import threading
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.to_thread
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedpool.errors import ConfigError, FedpoolError, SiteError, Unreachable
from fedpool.fields import describe_problems
from fedpool.paths import check_name
from fedpool.sites.desk import SITE_ROUND, Phase, Piece, Report, Reports
from fedpool.sites.output import LogLine
from fedpool.sites.resident import Resident
from fedpool.storable import storable

_RETRY_S = 2.0


class RoundAsked(BaseModel):
    """The parameters of a site's part of a round; see the flow `site_round`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: Annotated[str, AfterValidator(partial(check_name, "job_id"))]
    site: str
    round: int = Field(ge=0)
    attempt: int = Field(ge=0)
    store: str


def check_piece(piece: Piece) -> None:
    """Refuse everything except a site's part of a round with exactly its own parameters.

    Raises:
        PermissionError: the kind of work or its parameters are not allowed.
    """
    if piece.kind != SITE_ROUND:
        raise PermissionError(f"this site runs only {SITE_ROUND}: the run of {piece.kind!r} was refused")
    takes = sorted(RoundAsked.model_fields)
    if sorted(piece.parameters) != takes:
        given = ", ".join(sorted(piece.parameters)) or "no parameters"
        raise PermissionError(f"{SITE_ROUND} takes {', '.join(takes)}: a run with {given} was refused")


async def do_piece(desk: Reports, piece: Piece, resident: Resident, *, stop: threading.Event) -> None:
    """Do a piece that `check_piece` has passed, and report its progress; returns when it has ended.

    Args:
        resident: the resident site.
        stop: set it to end the piece at once, as cancelled.
    """
    # A busy server may take seconds to accept the report that the work has begun. The round does
    # not wait for that.
    beginning = asyncio.create_task(_begin(desk, piece, resident, stop))

    def work() -> Report:
        return do_round(resident, _asked(piece.parameters), stop=stop, log=lambda line: desk.log(piece, line))

    try:
        # A separate limit: pieces wait for their rounds, and would use up all other threads.
        ended = await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
    except (FedpoolError, OSError) as error:
        ended = Report(Phase.FAILED, storable(str(error)))
        desk.log(piece, ended.message, error=True)
    except BaseException:
        beginning.cancel()
        raise
    else:
        desk.log(piece, f"{ended.phase.capitalize()}: {ended.message}")
    with anyio.CancelScope(shield=True):
        if await beginning:
            await _report(desk, piece, ended, resident)


def do_round(resident: Resident, asked: RoundAsked, *, stop: threading.Event, log: LogLine) -> Report:
    """Do a site's part of a round. Blocks, so call it on a thread.

    Args:
        stop: set it to end the work at once.
        log: called with each line that the script prints.

    Returns: completed; cancelled if the work was stopped, or if the round or the job was over
    before the work began here; crashed if the site was stopped.

    Raises:
        SiteError: the script or the store failed, or the run is for another site or another store.
    """
    if resident.config.name != asked.site:
        raise SiteError(
            asked.site, asked.round, f"this is {resident.config.name}: the run was sent to the wrong work pool"
        )
    try:
        resident.config.check_store(asked.store)
    except ConfigError as error:
        raise SiteError(asked.site, asked.round, str(error)) from None
    try:
        came = resident.perform(asked.job_id, asked.round, asked.attempt, stop=stop, log=log)
    except SiteError:
        if resident.closed:
            return Report(Phase.CRASHED, "the site was stopped before it finished its part")
        if stop.is_set():
            return Report(Phase.CANCELLED, "the run was cancelled")
        raise
    if not came:
        return Report(Phase.CANCELLED, "the round or the job was over before the work began here")
    return Report(Phase.COMPLETED, f"{asked.site} finished its part of round {asked.round}")


def _asked(parameters: Mapping[str, Any]) -> RoundAsked:
    try:
        return RoundAsked.model_validate(dict(parameters))
    except ValidationError as error:
        wrong = "; ".join(describe_problems(RoundAsked, error, parameters))
        raise ConfigError(f"the run's parameters are invalid: {wrong}") from None


async def _begin(desk: Reports, piece: Piece, resident: Resident, stop: threading.Event) -> bool:
    """Report that a piece has begun; if it was ended elsewhere, stop the work and return False."""
    if await _report(desk, piece, Report(Phase.STARTED), resident):
        return True
    stop.set()
    return False


async def _report(desk: Reports, piece: Piece, report: Report, resident: Resident) -> bool:
    """Report as soon as the desk can be reached.

    Returns: whether the report was accepted; True if the site is closing and the desk cannot be
    reached, so that nothing waits.
    """
    while True:
        try:
            return await desk.report(piece, report)
        except Unreachable:
            if resident.closed:
                return True
            await asyncio.sleep(_RETRY_S)
