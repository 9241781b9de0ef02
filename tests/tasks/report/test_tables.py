"""Rounds as tables and the job's report: pure functions of the rounds' records."""

from typing import Any

import pytest

from fedpool.tasks.record import RoundRecord
from fedpool.tasks.report.tables import final_report, metric_names, report_rows, round_table, values
from tests.records import record_of, result_of


def site(name: str, **changes: Any) -> dict[str, Any]:
    return {"site": name, "size": 1024, "weight": 30.0, "metrics": {}, "logged": {}, "seconds": 1.5, **changes}


def record(number: int = 0, **changes: Any) -> RoundRecord:
    return record_of(
        {
            "round": number,
            "task": "train",
            "model": {"owner": "server", "round": number},
            "sites": ["site-1", "site-2", "site-3"],
            "accepted": [site("site-3"), site("site-1", metrics={"accuracy": 0.5, "loss": None}, logged={"lr": 0.1})],
            "rejected": [],
            "failed": [
                {"site": "site-2", "cause": "the script ended with exit code 1\nTraceback (most recent call last):"}
            ],
            "late": [],
            "probed": [],
            "metrics": {"accuracy": 0.5},
            "logged": {"lr": 0.1},
            "timings": {"round_s": 2.345},
            **changes,
        }
    )


RESULT: dict[str, Any] = {
    "status": "COMPLETED",
    "error": None,
    "stopped_by": None,
    "final": {"round": 2, "path": "runs/job/2", "metrics": {"accuracy": 0.75, "loss": 0.25}},
    "best": {"round": 1, "path": "runs/job/1", "metrics": {"accuracy": 0.8}},
}


def test_metric_names_are_those_of_metrics_and_logged_scalars_once_and_sorted() -> None:
    assert metric_names([record(), record(metrics={"z": 1.0, "accuracy": 0.1})]) == ["accuracy", "lr", "z"]
    assert metric_names([]) == []


def test_one_site_that_reports_a_thousand_names_pushes_no_metric_of_the_others_out_of_the_table() -> None:
    flood = {f"a{number:03d}": 0.0 for number in range(1000)}
    crowd = [
        site("site-1", metrics={"loss": 1.0}),
        site("site-2", metrics={"loss": 1.0}),
        site("site-3", metrics=flood),
    ]
    shown = metric_names([record(accepted=crowd, metrics={"loss": 1.0, **flood}, logged={})])
    assert shown == [f"a{number:03d}" for number in range(49)] + ["loss"]
    assert len(report_rows([record(accepted=crowd, metrics={"loss": 1.0, **flood}, logged={})])[0]) == 50 + 4


def test_a_rounds_table_has_a_row_per_site_with_examples_metrics_seconds_and_bytes() -> None:
    rows = round_table(record())
    assert [row["site"] for row in rows] == ["site-1", "site-2", "site-3"]
    assert rows[0] == {
        "site": "site-1",
        "state": "accepted",
        "examples": "30",
        "accuracy": "0.5000",
        "lr": "0.1000",
        "seconds": "1.50",
        "bytes": "1024",
    }


def test_a_site_that_reported_no_metric_has_an_empty_cell() -> None:
    assert round_table(record())[2]["accuracy"] == ""
    assert round_table(record(metrics={"accuracy": 0.5, "loss": 1.0}))[0]["loss"] == ""


def test_a_failed_or_rejected_site_is_in_the_table_with_the_first_line_of_its_cause() -> None:
    rows = round_table(record(rejected=[{"site": "site-4", "code": "shape", "reason": "w: expected [2], got [3]"}]))
    assert rows[1] == {"site": "site-2", "state": "failed: the script ended with exit code 1"}
    assert rows[3] == {"site": "site-4", "state": "rejected: w: expected [2], got [3]"}


def test_a_reports_table_has_a_row_per_round_and_a_column_per_metric() -> None:
    header, rows = report_rows(
        [record(), record(1, task="evaluate", metrics={"accuracy": 0.75, "loss": 2.0}, logged={})]
    )
    assert header == ["round", "task", "sites", "accuracy", "loss", "lr", "seconds"]
    assert rows == [
        ["0", "train", "2/3", "0.5000", "", "0.1000", "2.35"],
        ["1", "evaluate", "2/3", "0.7500", "2.0000", "", "2.35"],
    ]


def test_a_metric_wins_over_a_logged_scalar_of_its_name() -> None:
    both = record(metrics={"accuracy": 0.5}, logged={"accuracy": 0.1, "lr": 0.01})
    assert report_rows([both])[1][0][3] == "0.5000"
    assert values(both) == {"accuracy": 0.5, "lr": 0.01}


def test_the_report_names_outcome_models_scores_and_rounds() -> None:
    report = final_report("hello", result_of(RESULT), [record()])
    assert report.startswith("# hello: completed\n")
    assert "- **final model**: the start of round 2, accuracy 0.7500, loss 0.2500: `runs/job/2`" in report
    assert "- **best model**: the start of round 1, accuracy 0.8000: `runs/job/1`" in report
    assert (
        "| round | task | sites | accuracy | lr | seconds |\n| --- | --- | --- | --- | --- | --- |\n| 0 | train | 2/3 |"
        in report
    )
    assert "stopped early" not in report
    assert "```" not in report


def test_the_report_names_the_artifacts_that_hold_the_curves() -> None:
    assert "- curves: the artifacts `curve-a`, `curve-b`" in final_report(
        "hello", result_of(RESULT), [], pictures=["curve-a", "curve-b"]
    )
    assert "curves" not in final_report("hello", result_of(RESULT), [])


def test_the_report_says_what_the_table_does_not_show_unless_the_error_does() -> None:
    found = ["site-1 (round 0) failed: why", "the key metric is missing"]
    assert final_report("hello", result_of(RESULT), [], findings=found).endswith("\n```\n" + "\n".join(found) + "\n```")
    told = final_report("hello", result_of({**RESULT, "error": "the key metric is missing"}), [], findings=found)
    assert told.count("the key metric is missing") == 1 and found[0] in told


def test_an_update_that_did_not_count_says_so_in_the_table() -> None:
    rows = round_table(record(accepted=[site("site-1", weight=0.0)]))
    assert rows[0]["state"] == "accepted, but its weight is 0"
    assert round_table(record(task="evaluate", accepted=[site("site-1", weight=0.0)]))[0]["state"] == "accepted"


def test_a_metrics_name_cannot_break_the_reports_table() -> None:
    assert "| sites | a\\|b c | seconds |" in final_report(
        "hello", result_of(RESULT), [record(metrics={"a|b\nc": 1.0}, logged={})]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stopped_by": "accuracy >= 0.8"}, "- stopped early: accuracy >= 0.8"),
        (
            {"status": "FAILED", "error": "round 1: site-2 failed"},
            "# hello: failed\n\n```\nround 1: site-2 failed\n```",
        ),
        (
            {"evaluation_error": "site-1 failed: why"},
            "- **the final model is not scored**:\n\n```\nsite-1 failed: why\n```",
        ),
        ({"final": {"round": 1, "path": "p", "metrics": {}}}, "the start of round 1, not scored: `p`"),
    ],
)
def test_the_report_says_how_a_job_ended(changes: dict[str, Any], words: str) -> None:
    assert words in final_report("hello", result_of({**RESULT, **changes}), [])
