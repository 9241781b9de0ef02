"""Virtual time: who works on what, when rounds close, and that the records alone determine it."""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import pytest

from fedpool import RecipeError, SimEnv
from fedpool.errors import SiteError
from fedpool.tasks.answers import Answers, Turn
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Failed, Late
from fedpool.tasks.job_record import SPEEDS, EnvironmentRecord
from fedpool.tasks.quorum import Quorum
from fedpool.tasks.virtual_round import VirtualClock
from fedpool.tasks.virtual_time import Part, Schedule, contradiction, speeds_by_site, units_of
from fedpool.tensors import Digest
from tests.records import record_of
from tests.updates import sent_by

UNITS = {"a": 1.0, "b": 2.0, "c": 5.0}
WANTED = Expected("job-1", 0, "train", "b" * 64, {}, "FULL")


def turn_of(sites: Sequence[str], quorum: Quorum) -> Turn:
    return Turn("train", Digest("b" * 64, 1), WANTED, state=None, deadline=None, quorum=quorum, sites=sites, probes=())


async def play(
    clock: VirtualClock, number: int, quorum: Quorum, sites: Sequence[str] = tuple(UNITS), fails: Sequence[str] = ()
) -> Mapping[str, Sequence[str]]:
    """Play a round in which real work takes no time; returns who was accepted, late or failed."""
    answers, turn = Answers(0.0, quorum, ()), turn_of(sites, quorum)

    def work(site: str) -> Any:
        async def ask(own: Answers) -> None:
            await asyncio.sleep(0)
            if site in fails:
                own.add(Failed(site, 0, "it broke"))
                raise SiteError(site, number, "it broke")
            own.add(Accepted(sent_by(site, round=number), "m" * 64, 1.0, None))

        return ask

    clock.begin(number, turn, answers)
    calls: list[Coroutine[Any, Any, None]] = [clock.ask(site, 0, turn, work(site)) for site in sites]
    raised = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(error, SiteError) for error in raised] == [site in fails for site in sites]
    kinds = {Accepted: "accepted", Late: "late", Failed: "failed"}
    told: dict[str, list[str]] = {}
    for outcome in answers.outcomes:
        told.setdefault(kinds[type(outcome)], []).append(outcome.site)
    return told


def test_a_round_closes_when_the_quorums_rule_says_so_in_virtual_time() -> None:
    async def rounds() -> None:
        clock = VirtualClock(Schedule(UNITS))
        two = Quorum(2, grace=0.0)
        assert await play(clock, 0, two) == {"accepted": ["a", "b"], "late": ["c"]}
        assert (clock.schedule.now, clock.owes("c", 0), clock.owes("a", 0)) == (2.0, True, False)
        assert await play(clock, 1, two) == {"accepted": ["a", "b"], "late": ["c"]}
        assert clock.schedule.at_work == {"c": Part(0, 5.0)}  # it has not begun round 1
        assert await play(clock, 2, Quorum(3)) == {"accepted": ["a", "b", "c"]}
        assert clock.schedule.now == 10.0  # c finished round 0 at 5, then began round 2, and was waited for

    asyncio.run(rounds())


def test_what_ends_as_the_round_closes_is_in_time_and_begins_the_next_round_with_the_others() -> None:
    async def rounds() -> None:
        clock = VirtualClock(Schedule({"a": 2.0, "b": 2.0, "c": 4.0}))
        assert await play(clock, 0, Quorum(1, grace=0.0)) == {"accepted": ["a", "b"], "late": ["c"]}
        assert await play(clock, 1, Quorum(1, grace=0.0)) == {"accepted": ["a", "b"], "late": ["c"]}
        assert (clock.schedule.now, dict(clock.schedule.at_work)) == (4.0, {})

    asyncio.run(rounds())


def test_the_rest_are_given_their_grace_and_no_more() -> None:
    async def rounds() -> None:
        clock = VirtualClock(Schedule(UNITS))
        assert await play(clock, 0, Quorum(2, grace=1.0)) == {"accepted": ["a", "b"], "late": ["c"]}
        assert clock.schedule.now == 4.0
        clock = VirtualClock(Schedule(UNITS))
        assert await play(clock, 0, Quorum(2, grace=1.5)) == {"accepted": ["a", "b", "c"]}
        assert clock.schedule.now == 5.0

    asyncio.run(rounds())


def test_of_those_that_come_at_one_moment_a_round_takes_the_first_ones() -> None:
    async def rounds() -> None:
        clock = VirtualClock(Schedule(dict.fromkeys("abc", 1.0)))
        assert await play(clock, 0, Quorum(1, take=2)) == {"accepted": ["a", "b"], "late": ["c"]}
        assert not clock.owes("c", 0)  # its update has arrived, and may be folded into the next round

    asyncio.run(rounds())


def test_a_site_that_fails_takes_its_time_and_counts_for_no_quorum() -> None:
    async def rounds() -> None:
        clock = VirtualClock(Schedule(UNITS))
        told = await play(clock, 0, Quorum(2, grace=0.0), fails=["b"])
        assert told == {"accepted": ["a", "c"], "failed": ["b"]}
        assert clock.schedule.now == 5.0

    asyncio.run(rounds())


def test_the_schedule_follows_from_the_records_alone() -> None:
    async def rounds() -> tuple[VirtualClock, list[dict[str, Any]]]:
        clock, records = VirtualClock(Schedule(UNITS)), []
        for number in range(7):
            told = await play(clock, number, Quorum(2, grace=0.2))
            entries = {kind: [{"site": site} for site in sites] for kind, sites in told.items()}
            records.append({"round": number, "virtual_time": clock.schedule.now, **entries})
        return clock, records

    clock, said = asyncio.run(rounds())
    found = Schedule.after(UNITS, [record_of(record) for record in said])
    assert (found.now, dict(found.at_work)) == (clock.schedule.now, dict(clock.schedule.at_work))
    assert any(len(record["accepted"]) == 2 for record in said)


@pytest.mark.parametrize("speeds", [[1, 0], [1, -1], [float("nan"), 1], [1, float("inf")], {"site-1": 0, "site-2": 1}])
def test_speeds_must_be_positive_and_finite(speeds: Any) -> None:
    with pytest.raises(RecipeError, match=r"speeds: site.* units of virtual time: give a finite number above 0"):
        SimEnv(num_clients=2, speeds=speeds)


@pytest.mark.parametrize(
    ("speeds", "message"),
    [
        ([1.0], "speeds has 1 values for 2 sites"),
        ({"site-1": 1.0, "site-3": 1.0, "site-2": 1.0}, "speeds names site-3, but the sites are site-1, site-2"),
        ({"site-1": 1.0}, "speeds lacks site-2, but the sites are site-1, site-2"),
    ],
)
def test_speeds_must_be_those_of_the_sites(speeds: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        speeds_by_site(speeds, ["site-1", "site-2"])


def test_a_job_says_the_speeds_of_its_sites_and_no_other_job_does() -> None:
    env = SimEnv(num_clients=2, speeds=[1.0, 2.0])
    assert env.recorded().settings.keys() == SimEnv().recorded().settings.keys()
    recorded = env.recorded({SPEEDS: speeds_by_site([1.0, 2.0], ["site-1", "site-2"])})
    assert units_of(recorded) == {"site-1": 1.0, "site-2": 2.0}
    assert units_of(EnvironmentRecord(type="SimEnv", settings={})) is None
    assert SimEnv(clients=("site-1", "site-2"), **recorded.settings).speeds == {"site-1": 1.0, "site-2": 2.0}


@pytest.mark.parametrize(
    ("said", "against"),
    [
        ({"virtual_time": 2.0, "accepted": [{"site": "a"}, {"site": "b"}], "late": [{"site": "c"}]}, None),
        ({"accepted": [{"site": "a"}]}, "differs from its job in whether time is virtual"),
        (
            {"virtual_time": 2.0, "accepted": [{"site": "a"}, {"site": "c"}], "late": [{"site": "b"}]},
            "has c's part of round 0, which ends at 5, but closed at 2",
        ),
    ],
)
def test_a_record_that_the_speeds_contradict_is_found_out(said: Mapping[str, Any], against: str | None) -> None:
    assert contradiction(Schedule(UNITS), record_of(said)) == against


def test_time_does_not_run_backwards_and_a_job_without_speeds_has_none() -> None:
    assert contradiction(Schedule(UNITS, now=3.0), record_of({"virtual_time": 2.0})) is not None
    assert contradiction(None, record_of({})) is None
    assert contradiction(None, record_of({"virtual_time": 2.0})) == "differs from its job in whether time is virtual"
