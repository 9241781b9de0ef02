"""The cross-site matrix: how it follows from the rounds' records, and how it is shown."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from fedpool.errors import IntegrityError
from fedpool.store import Store
from fedpool.tasks.matrix import (
    Matrix,
    cross_site_matrix,
    matrix_metrics,
    matrix_rows,
    owners,
    pooled,
    read_matrix,
    site_scores,
)
from fedpool.tasks.record import RoundRecord
from tests.records import record_of

NUM = "NUM_STEPS_CURRENT_ROUND"


def scored(
    round: int, owner: str, scores: Mapping[str, float | None], *, task: str = "evaluate", origin: int | None = None
) -> RoundRecord:
    """A round in which sites report an accuracy; a site whose score is None failed."""
    return record_of(
        {
            "round": round,
            "task": task,
            "model": {"owner": owner, "round": round if origin is None else origin},
            "sites": sorted(scores),
            "accepted": [
                {"site": site, "weight": float(at + 1), "metrics": {"acc": score}}
                for at, (site, score) in enumerate(sorted(scores.items()))
                if score is not None
            ],
        }
    )


ROUNDS = [
    scored(0, "server", {"a": 0.9, "b": 0.7}, task="train"),
    scored(1, "server", {"a": 0.5, "b": 0.25}),
    scored(2, "server", {"a": 0.1, "b": 0.1}, task="submit_model"),
    scored(3, "b", {"a": 0.75, "b": None}),
]


def test_every_site_has_a_row_and_a_missing_score_is_a_hole() -> None:
    assert cross_site_matrix(ROUNDS, best=1) == {
        "a": {"server": {"acc": 0.5, NUM: 1.0}, "b": {"acc": 0.75, NUM: 1.0}},
        "b": {"server": {"acc": 0.25, NUM: 2.0}},
    }


def test_a_best_model_of_the_training_has_the_scores_that_it_got_there() -> None:
    matrix = cross_site_matrix(ROUNDS, best=0)
    assert {site: row["server-best"]["acc"] for site, row in matrix.items()} == {"a": 0.9, "b": 0.7}


def test_a_best_model_that_was_scored_anew_has_the_new_scores() -> None:
    again = scored(3, "server-best", {"a": 0.8, "b": 0.8}, origin=0)
    matrix = cross_site_matrix([*ROUNDS[:3], again], best=0)
    assert {site: row["server-best"]["acc"] for site, row in matrix.items()} == {"a": 0.8, "b": 0.8}


def test_the_servers_models_come_before_the_sites() -> None:
    row = {owner: {"acc": 1.0, NUM: 1.0} for owner in ("z", "a", "server-best", "server")}
    assert owners({"a": row}) == ["server", "server-best", "a", "z"]


def test_pooled_scores_are_weighted_and_leave_out_who_has_none() -> None:
    assert pooled(cross_site_matrix(ROUNDS, best=1), "acc") == pytest.approx({"server": 1 / 3, "b": 0.75})


def test_its_table_has_a_column_per_model_and_a_last_row_for_all_sites() -> None:
    header, rows = matrix_rows(cross_site_matrix(ROUNDS, best=1), "acc")
    assert header == ["acc", "server", "b"]
    assert rows == [["a", "0.5000", "0.7500"], ["b", "0.2500", ""], ["all", "0.3333", "0.7500"]]


def test_its_metrics_are_sorted_after_the_one_that_matters_most() -> None:
    matrix: Matrix = {"a": {"server": {"loss": 1.0, "acc": 0.5, NUM: 1.0}, "b": {"f1": None, NUM: 1.0}}}
    assert matrix_metrics(matrix, first="loss") == ["loss", "acc", "f1"]
    assert matrix_metrics({}, first="loss") == []


def test_a_sites_scores_have_their_weight_beside_them() -> None:
    assert site_scores(record_of({"accepted": [{"weight": 7.0, "metrics": {"acc": 0.5}}]}).accepted[0]) == {
        "acc": 0.5,
        NUM: 7.0,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "Invalid JSON"),
        ("[]", "Input should be"),
        ('{"a": 1}', "a: Input should be"),
        ('{"a": {"b": {"acc": "high"}}}', "a: b: acc: Input should be a valid number"),
        ('{"a": {"b": {"acc": 0.5}}}', "a: b: NUM_STEPS_CURRENT_ROUND is missing"),
    ],
)
def test_a_file_that_is_not_a_matrix_is_named_with_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "cross_site.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"cross_site\.json is not a table of scores: ") as wrong:
        read_matrix(Store(tmp_path), "cross_site.json")
    assert words in str(wrong.value)


def test_a_matrix_is_read_as_it_was_written(tmp_path: Path) -> None:
    store, matrix = Store(tmp_path), cross_site_matrix(ROUNDS, 1)
    store.write_json("cross_site.json", matrix)
    assert read_matrix(store, "cross_site.json") == matrix
