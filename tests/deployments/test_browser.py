"""What users see of a proof of concept in the Prefect UI, in a real browser.

If the environment variable FEDPOOL_SCREENSHOTS names a folder, the pictures for docs/images are
written to it.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from fedpool import FedAvgRecipe, JobCancelled, PocEnv, Run
from tests import services
from tests.poc import GatedJob, scripts_of, wait_until_gone

SCRIPT = """
import numpy as np

import fedpool.client as flare

flare.init()
target = np.linspace(0, 1, 4, dtype=np.float32)
while flare.is_running():
    model = flare.receive()
    error = target - model.params["w"]
    loss = float(np.square(error).mean())
    print(f"round {model.current_round} on 128 rows that stay here: loss {loss:.4f}")
    flare.log("loss", loss)
    flare.send(
        flare.FLModel(
            params={"w": model.params["w"] + error / 2},
            metrics={"accuracy": 1 - loss},
            meta={"NUM_STEPS_CURRENT_ROUND": 128},
        )
    )
"""

PATIENCE_MS = 60_000
"""The UI's pages are megabytes of script, and graphs are drawn without a GPU: this takes seconds,
and many of them on a busy machine.
"""

# The graph shows a completed run as a bar of this green. It is drawn on a canvas, so there is no
# element to look for.
BARS_ARE_DRAWN = """
() => {
    const graph = document.querySelector("canvas");
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [graph.width, graph.height];
    const context = copy.getContext("2d");
    context.drawImage(graph, 0, 0);
    const pixels = context.getImageData(0, 0, copy.width, copy.height).data;
    let green = 0;
    for (let i = 0; i < pixels.length; i += 4) green += pixels[i + 1] > 120 && pixels[i] < 80 && pixels[i + 2] < 120;
    return green > 1000;
}
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocEnv]:
    """A proof of concept for this module only."""
    if services.find_chromium() is None:
        pytest.skip(services.CHROMIUM_MISSING)
    env = PocEnv(num_clients=2, home=tmp_path_factory.mktemp("poc"), progress=False)
    try:
        env.up()
        yield env
    finally:
        env.down()


@pytest.fixture(scope="module")
def job(poc: PocEnv, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A completed job in that proof of concept."""
    script = tmp_path_factory.mktemp("script") / "client.py"
    script.write_text(SCRIPT)
    recipe = FedAvgRecipe(
        name="hello", min_clients=2, num_rounds=2, model={"w": np.zeros(4, np.float32)}, train_script=script
    )
    run = poc.execute(recipe)
    run.get_result()
    return run


@pytest.fixture(scope="module")
def browser(job: Run) -> Iterator[Browser]:
    """A browser. Playwright occupies this thread's event loop, so the job runs first."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=services.find_chromium(), args=["--no-sandbox", "--disable-gpu"], headless=True
        )
        yield browser
        browser.close()


def open_page(browser: Browser, poc: PocEnv) -> Page:
    """A page of somebody who has never used the UI."""
    context = browser.new_context(
        base_url=poc.ui_url, viewport={"width": 1280, "height": 800}, locale="en-US", timezone_id="UTC"
    )
    context.set_default_timeout(PATIENCE_MS)
    return context.new_page()


@pytest.fixture(scope="module")
def page(browser: Browser, poc: PocEnv) -> Page:
    """A page of the UI, signed in by the link."""
    page = open_page(browser, poc)
    page.goto(poc.ui_link)
    return page


@pytest.fixture
def take(page: Page, tmp_path: Path) -> Callable[[str], None]:
    """Saves a screenshot of the page to a file."""
    folder = Path(os.environ.get("FEDPOOL_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def screenshot(name: str) -> None:
        page.mouse.move(0, 0)  # so that no element is highlighted
        page.screenshot(path=folder / name, animations="disabled")

    return screenshot


def link(page: Page, name: str) -> Locator:
    """The first link with exactly this text."""
    return page.get_by_role("link", name=name, exact=True).first


def open_run(page: Page, name: str) -> None:
    """Find a flow run by its name on the page of all runs, and open it."""
    page.goto("/runs")
    page.get_by_role("searchbox", name="Search by flow run name").fill(name)
    # The list is redrawn when the search is answered: a click at that moment would be lost.
    page.goto(link(page, name).get_attribute("href") or "")
    expect(page).to_have_url(re.compile("/runs/flow-run/"))


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tablist").get_by_text(name, exact=True).click()


def wait_for_graph(page: Page) -> None:
    page.locator("canvas").wait_for()
    page.wait_for_function(BARS_ARE_DRAWN, polling="raf")


@pytest.mark.timeout(600)  # brings up a server, three workers and a browser
@pytest.mark.parametrize("ui", ["", "/v2"])  # Prefect has two, which share the password
def test_the_link_opens_the_ui_signed_in_and_the_address_alone_asks_for_the_password(
    ui: str, browser: Browser, poc: PocEnv, job: Run
) -> None:
    page = open_page(browser, poc)
    page.goto(f"{ui}/runs")
    expect(page.get_by_role("button", name="Login", exact=True)).to_be_visible()
    page.goto(poc.ui_link)
    expect(page).to_have_url(re.compile("/dashboard"))
    assert "#" not in page.url
    page.goto(f"{ui}/runs")
    expect(link(page, job.job_id)).to_be_visible()


@pytest.mark.timeout(600)
def test_a_jobs_run_is_found_by_its_name_and_leads_to_the_runs_of_its_rounds(
    page: Page, job: Run, take: Callable[[str], None]
) -> None:
    open_run(page, job.job_id)
    open_tab(page, "Subflow Runs")
    for number in (0, 1, 2):
        expect(link(page, f"hello round {number}")).to_be_visible()
    wait_for_graph(page)
    take("job-runs.png")


def test_a_rounds_run_leads_to_its_job_and_to_the_runs_at_its_sites(
    page: Page, job: Run, take: Callable[[str], None]
) -> None:
    open_run(page, "hello round 1")
    expect(link(page, job.job_id)).to_be_visible()
    open_tab(page, "Subflow Runs")
    for site in ("site-1", "site-2"):
        expect(link(page, f"{job.job_id} round 1 {site}")).to_be_visible()
    wait_for_graph(page)
    take("round-graph.png")


def test_what_a_script_prints_and_logs_is_in_the_log_of_its_sites_run(
    page: Page, job: Run, take: Callable[[str], None]
) -> None:
    open_run(page, f"{job.job_id} round 1 site-2")
    expect(link(page, "hello round 1")).to_be_visible()
    expect(page.get_by_text("round 1 on 128 rows that stay here: loss 0.0972", exact=True)).to_be_visible()
    expect(page.get_by_text("loss = 0.0972222", exact=True)).to_be_visible()
    expect(page.get_by_text("Completed: site-2 finished its part of round 1", exact=True)).to_be_visible()
    take("site-log.png")


def test_the_loss_curve_is_a_picture_among_the_artifacts(page: Page, job: Run, take: Callable[[str], None]) -> None:
    page.goto("/artifacts")
    for key in ("curve-accuracy", "final-model", "best-model", "report"):
        expect(page.get_by_text(key, exact=True)).to_be_visible()
    page.get_by_text("curve-loss", exact=True).click()
    expect(page).to_have_url(re.compile("/artifacts/key/curve-loss$"))
    page.locator("a[href*='/artifacts/artifact/']").first.click()
    picture = page.locator("img[src^='data:image/svg+xml;base64,']")
    expect(picture).to_be_visible()
    expect(picture).to_have_js_property("complete", True)
    expect(picture).to_have_js_property("naturalWidth", 640)
    expect(link(page, job.job_id)).to_be_visible()
    take("loss-curve.png")


@pytest.mark.timeout(600)
def test_a_job_that_runs_is_cancelled_by_its_button_and_its_sites_stop(page: Page, poc: PocEnv, tmp_path: Path) -> None:
    job = GatedJob(tmp_path, ("site-1", "site-2"), num_rounds=2)
    with ThreadPoolExecutor(1) as aside:  # Playwright occupies this thread's event loop
        run: Run = aside.submit(job.recipe.execute, poc, wait=False).result()
    job.wait_until_held(run)
    open_run(page, run.job_id)
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Confirm", exact=True).click()
    with pytest.raises(JobCancelled):
        run.get_result(60)
    wait_until_gone(scripts_of, poc.home, 10)
    expect(page.get_by_text("Cancelled", exact=True).first).to_be_visible()
