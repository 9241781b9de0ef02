"""Late updates that count in a later round: their effect, their weight, and that each counts at
most once.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpool import FedAvgRecipe, RecipeError, ScaffoldRecipe
from fedpool.arrays import load_arrays, save_and_hash
from fedpool.flows.fedavg import FedAvg
from fedpool.flows.late_updates import LateUpdates, folds
from fedpool.flows.scaffold import Scaffold
from fedpool.paths import JobPaths
from fedpool.sites.site_round import Delivery
from fedpool.store import Store
from fedpool.tasks.aggregate import Before, aggregate
from fedpool.tasks.aggregator import Aggregator
from fedpool.tasks.aggregators import Krum, Mean, Median
from fedpool.tasks.causes import causes_over_rounds
from fedpool.tasks.expected import Expected
from fedpool.tasks.gate import Accepted, Rejected, counting_in, judge
from fedpool.tasks.quarantine import quarantined
from fedpool.tasks.report.tables import report_rows, round_table
from fedpool.tasks.retention import drop_updates
from fedpool.tasks.staleness import Awaited, awaited, discount
from fedpool.tasks.strategy import State, Strategy, Update
from fedpool.tensors import Digest
from tests.records import record_of
from tests.updates import sent_by

PATHS = JobPaths("job-1")
Params = Mapping[str, Any]


class Rounds:
    """Rounds in a local store, each with its own global model, and real updates that passed the
    gate.
    """

    def __init__(self, folder: Path, *models: Params) -> None:
        self.store = Store(folder)
        self.digests = [self._save(PATHS.global_model(number), model) for number, model in enumerate(models)]
        self.updates: list[Accepted] = []

    @property
    def number(self) -> int:
        return len(self.digests) - 1

    def send(self, site: str, params: Params, *, round: int, weight: float = 1.0, kind: Any = "FULL") -> None:
        """Send an update for a round; it counts in the last round."""
        outcome = self.judged(site, params, round=round, weight=weight, kind=kind)
        assert isinstance(outcome, Accepted), outcome
        self.updates.append(outcome)

    def judged(
        self, site: str, params: Params, *, round: int, weight: float = 1.0, kind: Any = "FULL", **limits: Any
    ) -> Accepted | Rejected:
        digest, base = self._save(PATHS.update(round, site), params), self.digests[round]
        reader = self.store.tensors(PATHS.global_model(round), base.size)
        sent = {"round": round, "weight": weight, "params_type": kind, "sha256": digest.sha256, "size": digest.size}
        manifest = sent_by(site, base_sha256=base.sha256, **sent)
        wanted = Expected("job-1", round, "train", base.sha256, reader.spec, "FULL", base=reader, **limits)
        wanted = replace(wanted, transfer=kind)
        outcome = judge(self.store, site, 0, Delivery(manifest, "m" * 64), wanted)
        return outcome if round == self.number else counting_in(self.number, outcome, wanted)

    def next(self, strategy: Strategy | None = None, holes: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The next global model."""
        base = self.store.tensors(PATHS.global_model(self.number), self.digests[-1].size)
        aggregate(
            strategy or FedAvg(),
            store=self.store,
            before=Before(base, holes=holes),
            updates=self.updates,
            factors={},
            target=PATHS.global_model(self.number + 1),
            state_target=PATHS.state(self.number),
        )
        return load_arrays(Path(self.store.full(PATHS.global_model(self.number + 1))), "torch")

    def _save(self, path: str, params: Params) -> Digest:
        with self.store.staged(path) as file:
            return save_and_hash(file, params)


def w(*values: float) -> dict[str, Any]:
    return {"w": np.array(values, dtype=np.float64)}


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_a_late_update_moves_the_model_by_its_difference_to_its_own_base(kind: str, tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, w(0, 0), w(5, 5), w(10, 20))
    rounds.send("site-1", w(12, 20), round=2, weight=3)
    rounds.send("site-2", w(1, -4), round=0, weight=5, kind=kind)  # its base was 0, so both kinds are the same
    rounds.send("site-3", w(6, 5) if kind == "FULL" else w(1, 0), round=1, weight=2, kind=kind)
    weights = np.array([3, 5 / np.sqrt(3), 2 / np.sqrt(2)])
    deltas = np.array([[2, 0], [1, -4], [1, 0]])
    wanted = np.array([10, 20]) + weights @ deltas / weights.sum()
    np.testing.assert_allclose(rounds.next()["w"].numpy(), wanted, rtol=1e-14)


def test_a_site_may_have_a_fresh_update_and_a_late_one_in_a_round(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, w(0), w(10))
    rounds.send("site-1", w(12), round=1)
    rounds.send("site-1", w(4), round=0)
    share = 1 / np.sqrt(2)
    assert rounds.next()["w"].item() == pytest.approx(10 + (2 + share * 4) / (1 + share), rel=1e-14)


def test_without_late_updates_the_order_in_which_updates_come_changes_no_bit(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path / "one", w(0.1, 0.2))
    for site, value in (("site-2", 0.3), ("site-1", 0.7), ("site-10", 1.1)):
        rounds.send(site, w(value, -value), round=0, weight=value)
    weights = {"site-1": 0.7, "site-2": 0.3, "site-10": 1.1}
    found = rounds.next()["w"].numpy()
    other = Rounds(tmp_path / "two", w(0.1, 0.2))
    for site, value in weights.items():
        other.send(site, w(value, -value), round=0, weight=value)
    assert found.tobytes() == other.next()["w"].numpy().tobytes()


class Seen(FedAvg):
    """Checks what a strategy is given, without recording it."""

    def apply(self, state: State, updates: Any) -> State:
        given: list[Update] = list(updates)
        assert [(update.site, update.staleness, update.key) for update in given] == [
            ("site-1", 1, "site-1@1"),
            ("site-1", 0, "site-1"),
            ("site-2", 1, "site-2@1"),
        ]
        assert given[0].weight / given[1].weight == discount(1)
        assert given[0].params["w"].tolist() == [11.0]
        return super().apply(state, updates)


def test_a_strategy_sees_how_stale_an_update_is(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, w(0), w(10))
    rounds.send("site-2", w(1), round=0)
    rounds.send("site-1", w(12), round=1)
    rounds.send("site-1", w(1), round=0)
    rounds.next(Seen())


@pytest.mark.parametrize(("rule", "wanted"), [(Median(), 11.0), (Krum(num_byzantine=1), 11.0), (Mean(), None)])
def test_a_robust_rule_works_on_a_late_update_as_on_any_other(
    rule: Aggregator, wanted: float | None, tmp_path: Path
) -> None:
    rounds = Rounds(tmp_path, w(0), w(10))
    rounds.send("site-1", w(11), round=1)
    rounds.send("site-2", w(11), round=1)
    rounds.send("site-2", w(1), round=0)
    rounds.send("site-3", w(1000), round=0)  # hostile
    rounds.send("site-4", w(11), round=1)
    found = rounds.next(FedAvg(rule))["w"].item()
    assert found > 100 if wanted is None else found == wanted


def test_what_nobody_trains_is_averaged_as_the_sites_have_it(tmp_path: Path) -> None:
    def model(variance: float, count: int, flag: bool) -> dict[str, Any]:
        return {
            "running_var": torch.tensor([variance]),
            "num_batches_tracked": torch.tensor(count),
            "on": torch.tensor(flag),
        }

    rounds = Rounds(tmp_path, model(9.0, 0, False), model(1.0, 10, False))
    rounds.send("site-1", model(0.5, 4, True), round=0)  # its variance shrank by 8.5, but 1 - 8.5 is not a variance
    found = rounds.next()
    assert (found["running_var"].item(), found["num_batches_tracked"].item(), found["on"].item()) == (0.5, 4, True)


def test_a_difference_of_what_nobody_trains_is_added_to_its_own_base(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, {"running_mean": torch.tensor([4.0])}, {"running_mean": torch.tensor([100.0])})
    rounds.send("site-1", {"running_mean": torch.tensor([-1.0])}, round=0, kind="DIFF")
    assert rounds.next()["running_mean"].item() == 3.0


def test_a_hole_that_others_have_filled_meanwhile_stays_filled(tmp_path: Path) -> None:
    inf = float("inf")
    rounds = Rounds(tmp_path, w(-inf, 0, -inf), w(-inf, 10, 7))
    holes = frozenset({"w"})
    outcome = rounds.judged("site-1", w(-inf, 2, -inf), round=0, holes=holes)
    assert isinstance(outcome, Accepted), outcome
    rounds.updates.append(outcome)
    assert rounds.next(holes=holes)["w"].tolist() == [-inf, 12, 7]


def test_the_norm_of_a_late_update_is_that_to_its_own_base(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, w(0, 0), w(100, 100))
    fits = rounds.judged("site-1", w(3, 4), round=0, max_norm=5.0)
    assert isinstance(fits, Accepted) and (fits.norm, fits.scale) == (5.0, 1.0)
    too_far = rounds.judged("site-2", w(100, 100), round=0, max_norm=5.0)
    assert isinstance(too_far, Rejected) and too_far.code == "norm"
    clipped = rounds.judged("site-3", w(6, 8), round=0, max_norm=5.0, clip=True)
    assert isinstance(clipped, Accepted)
    rounds.updates = [clipped]
    assert rounds.next()["w"].tolist() == [103, 104]


def late(site: str, round: int, staleness: int = 1, **fields: Any) -> dict[str, Any]:
    entry = {"site": site, "attempt": 0, "sha256": "a" * 64, "manifest_sha256": "m" * 64, "round": round, **fields}
    accepted = {"size": 1, "params_type": "FULL", "weight": 1.0, "metrics": {}, "logged": {}, "seconds": 1.0}
    return {**accepted, **entry, "staleness": staleness}


def test_a_late_update_is_awaited_until_a_round_has_judged_it(tmp_path: Path) -> None:
    first = record_of({"round": 0, "accepted": [{"site": "a"}], "late": [{"site": "b"}, {"site": "c"}]})
    assert awaited([first]) == [Awaited(0, "b", (0,)), Awaited(0, "c", (0,))]
    second = record_of(
        {"round": 1, "accepted": [{"site": "a"}], "late_accepted": [late("b", 0)], "late": [{"site": "b"}]}
    )
    assert awaited([first, second]) == [Awaited(0, "c", (0,)), Awaited(1, "b", (0,))]


def test_a_site_that_has_answered_a_later_round_owes_nothing_of_earlier_ones() -> None:
    first = record_of({"round": 0, "accepted": [{"site": "a"}], "late": [{"site": "b"}]})
    second = record_of({"round": 1, "accepted": [{"site": "a"}, {"site": "b"}]})
    assert awaited([first, second]) == []


def test_an_update_may_come_of_any_attempt_and_an_evaluation_owes_none() -> None:
    asked_twice = record_of({"round": 0, "late": [{"site": "b"}, {"site": "b", "attempt": 1}]})
    scoring = record_of({"round": 1, "task": "evaluate", "late": [{"site": "b"}]})
    assert awaited([asked_twice, scoring]) == [Awaited(0, "b", (0, 1))]


def test_late_updates_count_towards_quarantine_in_the_order_in_which_they_were_sent() -> None:
    refused = {"site": "b", "attempt": 0, "sha256": None, "manifest_sha256": None, "code": "norm", "reason": "far"}
    first = record_of({"round": 0, "rejected": [{"site": "b"}]})
    second = record_of({"round": 1, "late_rejected": [{**refused, "round": 0}]})
    assert quarantined([first, second], 2) == {"b"}
    third = record_of({"round": 1, "late_accepted": [late("b", 0)], "rejected": [{"site": "b"}]})
    assert quarantined([first, third], 2) == frozenset()


def test_a_late_update_goes_with_the_round_in_which_it_counted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in (0, 1):
        store.write_bytes(PATHS.update(number, "b"), b"1234")
    first = record_of({"round": 0, "late": [{"site": "b"}]})
    second = record_of({"round": 1, "accepted": [{"site": "b"}], "late_accepted": [late("b", 0)]})
    assert drop_updates(store, "job-1", first) == 0
    assert store.exists(PATHS.update(0, "b"))
    assert drop_updates(store, "job-1", second) == 8
    assert not store.exists(PATHS.update(0, "b"))


def test_people_are_told_in_which_round_a_late_update_counted() -> None:
    first = record_of({"round": 3, "accepted": [{"site": "a"}], "late": [{"site": "b"}, {"site": "c"}]})
    second = record_of({"round": 4, "accepted": [{"site": "a"}], "late_accepted": [late("b", 3)]})
    assert causes_over_rounds([first, second]) == [
        "b (round 3) was late, counted in round 4",
        "c (round 3) was late: the round did not wait for it",
    ]
    states = {row["site"]: row["state"] for row in round_table(second)}
    assert states == {"a": "accepted", "b": "late from round 3, counted in round 4 (staleness 1)"}
    assert report_rows([second])[1][0][2] == "1/1 + 1 late"


def test_a_record_without_late_updates_is_as_it_was() -> None:
    assert not {name for name in record_of({"round": 0}).as_json() if name.startswith("late_")}


def test_a_recipe_whose_updates_belong_to_their_round_refuses_to_fold_them(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text("import fedpool.client as flare\n", encoding="utf-8")
    common: dict[str, Any] = {"name": "job", "min_clients": 1, "num_rounds": 1, "model": w(0), "train_script": script}
    assert folds(FedAvgRecipe(**common, late="fold"))
    assert not folds(FedAvgRecipe(**common))
    with pytest.raises(RecipeError, match=r"ScaffoldRecipe has no late='fold'.*FedAvgRecipe"):
        ScaffoldRecipe(**common | {"late": "fold"})
    with pytest.raises(RecipeError, match="late"):
        FedAvgRecipe(**common, late="keep")

    class Own(LateUpdates):
        """Exchanges control variates."""

        def strategy(self, num_sites: int) -> Scaffold:
            return Scaffold(num_sites)

    with pytest.raises(RecipeError, match="late='fold' does not work with Scaffold"):
        Own(**common, late="fold").check_sites(["site-1"])
