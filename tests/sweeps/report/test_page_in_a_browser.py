"""The page in a real browser: what a person can do with it, by hand and by keyboard, and what an accessibility checker says."""

import csv
import dataclasses
import importlib.resources
import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from sweeps.report import html
from sweeps.report.tables import results_csv
from sweeps.spec.sweep import Configuration
from sweeps.state.view import View
from tests.support.browser import PHONE, Page, opened
from tests.support.reported import failed, made
from tests.support.searched import run_to_the_end, searched

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("page in a browser")]
DESKTOP = (1400, 900)


def ablation(path: Path) -> View:
    """Completed runs with logs and references, a failed one, and two that wait."""
    view = made(path, {"depth 1": [60.0, 61.0], "depth 2": [75.2, 76.0], "pointwise": [61.0, 60.2]})
    for trial in view.sweep.trials[:6]:
        run = view.sweep.run(trial)
        (run.logs / "train.log").write_text(f"begin\nlast line of {trial.label}\n")
        done = run.result()
        assert done is not None
        (run.path / "result.json").unlink()
        run.write_result(dataclasses.replace(done, references={"chance level": dict.fromkeys(done.metrics, 10.0)}))
    failed(view, 6, "NonFiniteError: loss nan at step 17", "one\nTraceback <of> it\n")
    return View(view.sweep)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of an ablation, of a search, and of a sweep whose runs have all failed."""
    folder = tmp_path_factory.mktemp("pages")
    search = searched(folder, max_trials=12)
    run_to_the_end(search, lambda t: 40.0 + 10 * float(t.values["optimizer"]["lr"]) + t.number % 3, hours=0.2)
    broken = made(folder / "failed", {}, [Configuration({"optimizer.lr": 0.1}), Configuration({"optimizer.lr": 0.2})], seeds=1)
    for number in range(2):
        failed(broken, number, "OSError: [Errno 28] No space left on device: '/" + "a_long_folder/" * 12 + "step-1.pt'")
    views = {"ablation": ablation(folder / "ablation"), "search": View(search), "failed": View(broken.sweep)}
    return {name: html.write(view) for name, view in views.items()}


@pytest.fixture(scope="module")
def browser(pages: dict[str, Path]) -> Iterator[Page]:
    with opened(pages["ablation"], DESKTOP) as page:
        yield page


@pytest.fixture
def page(browser: Page, pages: dict[str, Path]) -> Iterator[Page]:
    browser.go(pages["ablation"], DESKTOP)
    yield browser
    assert browser.complaints() == []


def first_column(page: Page, table: str) -> list[str]:
    """The first cell of each row of a table that is seen, from top to bottom."""
    rows = f"[...document.querySelectorAll('{table} tbody tr')]"
    return page.script(f"return {rows}.filter((row) => !row.hidden).map((row) => row.cells[0].textContent)")


def test_a_trial_is_opened_by_keyboard_and_two_are_compared(page: Page) -> None:
    first, second, *_ = page.all("#trials tbody tr")
    first.send_keys(Keys.ENTER)
    assert page.text("#details h3") == "00-depth1-seed42"
    assert "last line of depth 1" in page.text("#details pre")
    assert "method.predictor.depth 1" in page.text("#details table")
    page.click("#details summary")
    assert page.script("return document.querySelectorAll('#details details tr').length") > 40
    assert "optimizer.weight_decay" in page.text("#details details")
    second.send_keys(Keys.SPACE)
    assert page.text("#details h3").splitlines()[0] == "Difference of 2 selected trials"
    cells = "[...document.querySelectorAll('#details table')[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
    lines = page.script(f"return {cells}")
    assert lines[:2] == [["", "00-depth1-seed42", "01-depth2-seed42"], ["method.predictor.depth", "1", "2"]]
    assert ["linear top-1, held-out", "60.00", "75.20"] in lines
    assert page.script("return location.hash").count(",") == 1
    page.click("#clear")
    assert page.text("#details") == ""


def test_the_filter_acts_on_both_tables_and_on_the_curves(page: Page) -> None:
    def drawn() -> set[str]:
        return set(page.script("return document.getElementById('curves').data.map((t) => t.name.split('-')[1])"))

    assert drawn() == {"depth1", "depth2", "pointwise"}
    box = page.all("input.filter")[0]
    box.send_keys("depth=2 COMPLETED")
    assert first_column(page, "#trials") == ["depth 2"] * 2
    assert first_column(page, "#results") == ["depth 2", "chance level"]
    assert drawn() == {"depth2"}
    assert page.all(".matching")[1].text == "2 of 9 trials match"
    assert page.all("#filter")[0].get_attribute("value") == "depth=2 COMPLETED"
    box.clear()
    box.send_keys("nothing like it")
    assert first_column(page, "#trials") == []
    assert drawn() == set()


def test_tables_are_sorted_by_keyboard_and_say_how(page: Page) -> None:
    heads = page.all("#trials th button")
    assert page.all("#trials th[aria-sort]") == []
    heads[4].send_keys(Keys.ENTER)
    assert page.all("#trials th[aria-sort]")[0].get_attribute("aria-sort") == "descending"
    arrow = "return getComputedStyle(document.querySelector('#trials th[aria-sort] button'), '::after').content"
    assert "\u2193" in page.script(arrow)
    assert first_column(page, "#trials")[:5] == ["depth 2", "depth 2", "pointwise", "depth 1", "pointwise"]
    heads[4].send_keys(Keys.SPACE)
    assert page.all("#trials th[aria-sort]")[0].get_attribute("aria-sort") == "ascending"
    assert "\u2191" in page.script(arrow)
    assert first_column(page, "#trials")[0] == "depth 1"
    assert page.script("return document.querySelector('#trials tbody').lastElementChild.cells[4].textContent") == "-"  # without one, last
    page.all("#results th button")[0].send_keys(Keys.ENTER)
    assert first_column(page, "#results")[:2] == ["chance level", "depth 1"]


def test_tables_and_figures_are_downloaded(page: Page, tmp_path: Path, pages: dict[str, Path]) -> None:
    page.driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})

    def got(selector: str, name: str) -> bytes:
        page.click(selector)
        end = time.monotonic() + 30
        while not (tmp_path / name).exists() and time.monotonic() < end:
            time.sleep(0.05)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        return content

    file = "[data-file='results.csv']"
    assert got(file, "ablation-results.csv").decode() == results_csv(ablation_view(pages))
    assert got("[data-file='summary.csv']", "ablation-summary.csv").startswith(b"setting,")
    page.all("#filter")[0].send_keys("pointwise")
    lines = list(csv.DictReader(io.StringIO(got(file, "ablation-results.csv").decode())))
    assert [line["setting"] for line in lines] == ["pointwise"] * 3
    assert got("[data-figure='scores-0'][data-format='png']", "ablation-scores-0.png").startswith(b"\x89PNG")
    assert b"<svg" in got("[data-figure='curves'][data-format='svg']", "ablation-curves.svg")


def ablation_view(pages: dict[str, Path]) -> View:
    from sweeps.state.folder import Sweep

    return View(Sweep.load(pages["ablation"].parent))


# All rules of axe at the levels A and AA of WCAG 2, and its best practices. It cannot judge the text of figures; that of their colours
# is in test_report_figures.py.
_AXE = """
    const done = arguments[0], asked = { resultTypes: ["violations"] };
    axe.run({ exclude: [[".svg-container"]] }, asked).then((found) => done(found.violations), (error) => done(String(error)));
"""


@pytest.mark.parametrize(("name", "size"), [("ablation", DESKTOP), ("search", PHONE), ("failed", PHONE)])
def test_an_accessibility_checker_finds_nothing_and_the_page_fits(
    name: str, size: tuple[int, int], browser: Page, pages: dict[str, Path]
) -> None:
    browser.go(pages[name], size)
    for row in browser.all("#trials tbody tr")[:2]:
        browser.script("arguments[0].click()", row)
    browser.script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.script((importlib.resources.files("axe_core_python") / "axe.min.js").read_text())
    found = browser.driver.execute_async_script(_AXE)
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []
    assert browser.script("return document.documentElement.scrollWidth") <= size[0]
    assert ("Best so far against budget" in browser.text("h3")) == (name == "search")
    assert max(browser.script("return [...document.querySelectorAll('.js-plotly-plot')].map((p) => p.clientWidth)"), default=0) < size[0]
    assert browser.complaints() == []
