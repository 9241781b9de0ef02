"""What a site's personal model starts from if the site is first drawn in a later round."""

from collections.abc import Callable
from typing import Literal

import pytest

from fedpool import DittoRecipe, Run
from fedpool.paths import JobPaths

SCRIPT = """
    import fedpool.client as flare

    flare.init()
    while flare.is_running():
        received = flare.receive()
        personal = flare.kept("personal", initial=True)
        metrics = {"personal": personal["w"][0], "received": received.params["w"][0]}
        flare.keep("personal", {"w": personal["w"] + 10})
        flare.send(flare.FLModel(params={"w": received.params["w"] + 1}, metrics=metrics))
"""


@pytest.mark.parametrize("start", ["initial", "received"])
def test_a_site_that_is_drawn_late_starts_from_what_the_recipe_says(
    run_job: Callable[..., Run], start: Literal["initial", "received"]
) -> None:
    run = run_job(
        SCRIPT,
        kind=DittoRecipe,
        env={"num_clients": 3},
        ditto_lambda=0.1,
        personal_start=start,
        min_clients=1,
        clients_per_round=1,
        num_rounds=6,
        final_evaluation=False,
    )
    personal: dict[str, int] = {}
    late = False
    for record in run.get_result().rounds:
        (update,) = record["accepted"]
        site, number = update["site"], record["round"]
        if site not in personal:
            personal[site] = 0 if start == "initial" else number
            late |= number > 0
        assert update["metrics"] == {"personal": personal[site], "received": number}
        personal[site] += 10
    assert late, "no site was drawn late: another seed is needed"


def test_a_job_of_an_earlier_version_goes_on_from_what_its_sites_receive(run_job: Callable[..., Run]) -> None:
    run = run_job(SCRIPT, kind=DittoRecipe, ditto_lambda=0.1, num_rounds=1)
    described = run._store.read_json(JobPaths(run.job_id).job)
    assert described["client"]["initial"] == described["model"]
    fields = described["recipe"]
    assert DittoRecipe.recorded(fields)["personal_start"] == "initial"
    del fields["personal_start"]
    assert DittoRecipe.recorded(fields)["personal_start"] == "received"
