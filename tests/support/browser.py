"""A real browser, headless: Debian's Chromium and its driver."""

import base64
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PHONE = (390, 844)
_WAIT_SECONDS = 60


class Page:
    """A file that a browser has opened and whose script has run."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def go(self, path: Path, size: tuple[int, int]) -> None:
        """Open another file, or the same again, in a window of that size; a start of the browser takes seconds."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")  # a page's address with another fragment would not be loaded again
        self._load(path)

    def _load(self, path: Path) -> None:
        self.driver.get(path.resolve().as_uri())
        WebDriverWait(self.driver, _WAIT_SECONDS).until(lambda d: d.execute_script("return document.body.dataset.ready === 'true'"))

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        """The first element of the selector, in the middle of the window."""
        element = self.all(selector)[0]
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def text(self, selector: str) -> str:
        return "\n".join(e.text for e in self.all(selector))

    def complaints(self) -> list[str]:
        """What the browser's console holds, and every address that the page asked for."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        return said + self.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")

    def empty_figures(self) -> list[str]:
        """Ids of the page's figures in which nothing is drawn."""
        known = self.script("return Object.keys(JSON.parse(document.getElementById('data').textContent).figures)")
        assert known
        drawn = "return document.querySelectorAll(`[id='${arguments[0]}'] .plot-container .main-svg path`).length"
        return [name for name in known if not self.script(drawn, name)]

    def click_on_curve(self, number: int) -> str:
        """Click on the last point of a drawn curve as a hand would; returns whose it is."""
        where = """
            const plot = document.getElementById('curves'), trace = plot.data[arguments[0]], axes = plot._fullLayout;
            plot.scrollIntoView({block: 'center'});
            const box = plot.getBoundingClientRect(), last = trace.x.length - 1;
            return [box.left + axes.xaxis._offset + axes.xaxis.d2p(trace.x[last]),
                    box.top + axes.yaxis._offset + axes.yaxis.d2p(trace.y[last]), trace.meta];
        """
        x, y, signature = self.script(where, number)
        ActionChains(self.driver, duration=50).move_by_offset(round(x) - 12, round(y)).move_by_offset(12, 0).pause(0.3).click().perform()
        ActionChains(self.driver).reset_actions()
        return str(signature)

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])


@contextlib.contextmanager
def opened(path: Path, size: tuple[int, int] = (1200, 900)) -> Iterator[Page]:
    """`path` in a window of that size."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(argument)
    if size == PHONE:
        metrics = {"width": size[0], "height": size[1], "pixelRatio": 2.0}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(chromedriver))
    try:
        driver.set_page_load_timeout(_WAIT_SECONDS)
        page = Page(driver)
        page._load(path)
        yield page
    finally:
        driver.quit()
