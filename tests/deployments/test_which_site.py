"""A script learns its site's index and the number of sites, with names in natural order."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpool import Run
from fedpool.site_order import in_order

SCRIPT = """
    import json, pathlib
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        who = {**flare.system_info(), "config": flare.get_config()}
        pathlib.Path(f"{flare.get_site_name()}.json").write_text(json.dumps(who))
        flare.send(flare.FLModel(params=model.params))
"""


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["site-10", "site-2", "site-1"], ["site-1", "site-2", "site-10"]),
        (["b", "a", "a1", "10", "9"], ["9", "10", "a", "a1", "b"]),
        (["site-01", "site-1", "site-1.5", "site-1.10"], ["site-01", "site-1", "site-1.5", "site-1.10"]),
    ],
)
def test_names_are_in_the_order_that_people_count_them_in(names: list[str], ordered: list[str]) -> None:
    assert in_order(names) == ordered == in_order(reversed(names))


def test_every_site_of_a_simulation_knows_its_place_and_the_values_for_all(
    run_job: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clients = ["site-10", "site-9", "site-100"]
    config = {"lr": 0.1, "data": "/data"}
    run = run_job(
        SCRIPT, env={"clients": clients}, num_rounds=1, config=config, per_site_config={"site-9": {"data": "/mine"}}
    )
    run.get_result()
    seen = {site: json.loads((tmp_path / f"{site}.json").read_text()) for site in clients}
    assert {site: (who["site_index"], who["num_sites"]) for site, who in seen.items()} == {
        "site-9": (0, 3),
        "site-10": (1, 3),
        "site-100": (2, 3),
    }
    assert {who["job_id"] for who in seen.values()} == {run.job_id}
    assert {site: who["config"] for site, who in seen.items()} == {
        "site-9": {"lr": 0.1, "data": "/mine"},
        "site-10": config,
        "site-100": config,
    }
