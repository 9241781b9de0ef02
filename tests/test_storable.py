"""Text from scripts, made storable."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpool.errors import SiteError
from fedpool.messages import UpdateManifest
from fedpool.storable import storable


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("plain, ünïcödé 🎉\n\tindented", "plain, ünïcödé 🎉\n\tindented"),
        ("a\x00b", r"a\x00b"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("1%\r2%", r"1%\r2%"),
        ("\x7f\x9b", r"\x7f\x9b"),
        ("a\ud800b", r"a\ud800b"),
    ],
)
def test_control_characters_are_escaped_and_nothing_else_is(text: str, stored: str) -> None:
    assert storable(text) == stored


@given(st.text(st.characters()), st.integers(0, 100))
def test_what_is_stored_fits_and_is_stored_the_same_again(text: str, limit: int) -> None:
    stored = storable(text, limit)
    assert len(stored) <= limit
    assert storable(stored, limit) == stored
    assert json.loads(json.dumps(stored)) == stored and "\x00" not in stored
    stored.encode()  # no lone surrogates


def test_of_a_long_text_the_beginning_and_the_end_are_kept() -> None:
    stored = storable("first " + "x" * 100_000 + " last", 1000)
    assert stored.startswith("first x") and stored.endswith("x last") and len(stored) <= 1000
    assert "characters left out" in stored


def test_the_cause_of_a_sites_failure_can_be_stored() -> None:
    error = SiteError("site-1", 0, "it said \x00")
    assert error.cause == r"it said \x00" and str(error) == r"site-1, round 0: it said \x00"


def test_names_in_a_manifest_can_be_stored_whoever_wrote_it() -> None:
    fields = {
        "job_id": "j",
        "site": "s",
        "round": 0,
        "task": "train",
        "base_sha256": "",
        "assignment_sha256": "",
        "seconds": 0.0,
    }
    text = json.dumps(fields | {"metrics": {"a\x00": 1.0}, "logged": {"b\x01": 2.0}, "meta": {"c\x02": "d\x03"}})
    manifest = UpdateManifest.model_validate_json(text)
    assert (manifest.metrics, manifest.logged, manifest.meta) == (
        {r"a\x00": 1.0},
        {r"b\x01": 2.0},
        {r"c\x02": r"d\x03"},
    )
