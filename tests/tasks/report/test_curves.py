"""Metrics over the rounds as pictures, and how they and the other artifacts reach the Prefect UI
at a job's end.
"""

import asyncio
import base64
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterName

from fedpool import Run
from fedpool.store import Store
from fedpool.tasks.record import RoundRecord
from fedpool.tasks.report import prefect_ui
from fedpool.tasks.report.curves import MAX_CURVES, Curve, curves, draw
from fedpool.tasks.report.prefect_ui import link_to
from tests.records import record_of

SVG = "{http://www.w3.org/2000/svg}"

VALUES = st.floats(min_value=-1e100, max_value=1e100)


def record(number: int, metrics: dict[str, float], logged: dict[str, float] | None = None) -> RoundRecord:
    return record_of({"round": number, "metrics": metrics, "logged": logged or {}})


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def line(svg: str) -> list[tuple[float, float]]:
    """Corners of the curve, in pixels."""
    found = ElementTree.fromstring(svg).find(f"{SVG}polyline")
    assert found is not None
    places = [place.split(",") for place in found.attrib["points"].split()]
    return [(float(left), float(height)) for left, height in places]


def drawn(*records: RoundRecord, first: str = "accuracy") -> list[Curve]:
    return curves(records, first=first)


def test_each_metric_and_each_logged_scalar_has_a_curve_with_the_key_metric_first() -> None:
    made = drawn(record(0, {"b": 1.0, "accuracy": 0.5}, {"a": 2.0}), record(1, {"accuracy": 0.6}))
    assert [curve.metric for curve in made] == ["accuracy", "a", "b"]
    assert [curve.key for curve in made] == ["curve-accuracy", "curve-a", "curve-b"]


def test_a_curve_goes_from_left_to_right_and_up_where_the_values_grow() -> None:
    (left, low), (middle, high), (right, between) = line(draw("loss", [(0, 1.0), (1, 3.0), (2, 2.0)]))
    assert left < middle < right
    assert low > between > high  # pixels are counted from the top


def test_both_axes_are_labelled_in_round_figures_and_the_last_value_is_written_out() -> None:
    labels = texts(draw("loss", [(0, 2.31), (1, 1.23456), (2, 0.11)]))
    assert labels[:2] == ["loss", "0.11 in round 2"]
    assert labels[2:] == ["0", "0.5", "1", "1.5", "2", "2.5", "0", "1", "2", "round"]


def test_one_value_shows_as_a_dot_in_the_middle() -> None:
    svg = draw("accuracy", [(7, 0.5)])
    (dot,) = ElementTree.fromstring(svg).iter(f"{SVG}circle")
    assert (dot.attrib["cx"], dot.attrib["cy"]) == ("360.0", "160.0")
    assert texts(svg)[-2:] == ["7", "round"]


def test_values_that_hardly_differ_are_told_apart_by_their_labels() -> None:
    labels = texts(draw("loss", [(0, 0.1234560), (1, 0.1234567)]))[2:-3]
    assert len(set(labels)) == len(labels) >= 4


@pytest.mark.parametrize("value", [1e101, -1e101])
def test_what_cannot_be_drawn_is_left_out(value: float) -> None:
    assert drawn(record(0, {"loss": value})) == []
    (curve,) = drawn(record(0, {"loss": value}), record(1, {"loss": 2.0}))
    assert curve.svg == draw("loss", [(1, 2.0)])


def test_a_metric_wins_over_a_logged_scalar_of_its_name() -> None:
    (curve,) = drawn(record(0, {"loss": 1.0}, {"loss": 9.0}))
    assert curve.svg == draw("loss", [(0, 1.0)])


def test_no_more_than_eight_curves_are_made() -> None:
    assert len(drawn(record(0, {f"m{number}": 1.0 for number in range(20)}))) == MAX_CURVES == 8


def test_a_key_holds_lowercase_letters_digits_and_dashes_and_no_two_are_the_same() -> None:
    made = drawn(record(0, {"Val/Loss %": 1.0, "val_loss": 1.0, "損失": 1.0, "-": 1.0}))
    assert [(curve.metric, curve.key) for curve in made] == [
        ("-", "curve-metric"),
        ("Val/Loss %", "curve-val-loss"),
        ("val_loss", "curve-val-loss-2"),
        ("損失", "curve-metric-2"),
    ]


def test_a_metrics_name_cannot_break_out_of_the_picture() -> None:
    svg = draw('</text><script>alert("1")</script>\x00\ud800', [(0, 1.0)])
    assert texts(svg)[0] == '</text><script>alert("1")</sc…'
    assert "\x00" not in svg
    svg.encode()


def test_a_long_jobs_curve_stays_small_and_keeps_its_peak() -> None:
    points = [(number, 0.0) for number in range(10_000)]
    points[4321] = (4321, 1.0)
    svg = draw("loss", points)
    assert len(svg) < 12_000
    assert min(height for _, height in line(svg)) == 48.0


@given(st.text(max_size=50), st.lists(VALUES, min_size=1, max_size=40), st.integers(0, 10**6))
def test_whatever_the_values_the_curve_is_inside_the_picture_and_the_same_again(
    name: str, numbers: list[float], start: int
) -> None:
    points = list(enumerate(numbers, start))
    svg = draw(name, points)
    assert len(texts(svg)) < 30
    assert all(96 <= left <= 624 and 48 <= height <= 272 for left, height in line(svg))
    assert draw(name, points) == svg


def test_a_models_link_is_the_stores_url_with_what_a_link_may_not_hold_escaped() -> None:
    store = Store("/tmp/my runs (old)")
    assert link_to(store, store.full("a/b")) == "file:///tmp/my%20runs%20%28old%29/a/b"
    store = Store("s3://bucket/jobs", anon=True)
    assert link_to(store, store.full("a/b")) == "s3://bucket/jobs/a/b"


SCRIPT = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        flare.log("Train/Loss", 1.5 - model.current_round)
        flare.send(flare.FLModel(params=model.params))
"""


def read_artifacts(name: str) -> dict[str, Any]:
    """key -> the artifact of the job's own run."""

    async def read() -> dict[str, Any]:
        async with get_client() as client:
            (job,) = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[job.id]))
            )
            return {artifact.key or "": artifact for artifact in found}

    return asyncio.run(read())


def test_a_jobs_run_ends_with_a_report_a_picture_per_metric_and_links_to_its_models(
    run_job: Callable[..., Run],
) -> None:
    result = run_job(SCRIPT, name="pictured").get_result()
    artifacts = read_artifacts("pictured")
    assert sorted(artifacts) == ["best-model", "curve-train-loss", "final-model", "progress", "report"]
    picture = artifacts["curve-train-loss"]
    assert picture.type == "image" and picture.description == "Train/Loss over rounds"
    head, _, data = picture.data.partition(",")
    assert head == "data:image/svg+xml;base64"
    assert base64.b64decode(data).decode() == draw("Train/Loss", [(0, 1.5), (1, 0.5)])
    assert artifacts["final-model"].data == f"[{result.path}]({result.path.as_uri()})"
    assert artifacts["best-model"].data == f"[{result.best_path}]({result.best_path.as_uri()})"
    assert "- curves: the artifacts `curve-train-loss`" in artifacts["report"].data
    assert str(result.path) in artifacts["report"].data


def test_a_picture_that_cannot_be_written_keeps_neither_the_job_nor_the_report_from_its_end(
    run_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("the server went away")

    monkeypatch.setattr(prefect_ui, "acreate_image_artifact", refuse)
    run = run_job(SCRIPT, name="unpictured")
    assert run.get_status() == "COMPLETED"
    assert sorted(read_artifacts("unpictured")) == ["best-model", "final-model", "progress", "report"]
