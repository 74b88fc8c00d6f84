"""A headless Chromium for tests of the dashboard, driven by selenium.

Debian's packages `chromium` and `chromium-driver` bring browser and driver;
`reason_without_browser` says what is missing.
"""

import base64
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

AXE = Path(__file__).with_name("axe-core") / "axe.min.js"
"""axe-core 4.14.1, which finds what keeps people from reading a page."""
SECONDS = 60.0
"""Longest wait for a change of the page."""


def reason_without_browser() -> str | None:
    """Why no browser can be started; None if one can."""
    if find_spec("selenium") is None:
        return "selenium is not installed (extra dev)"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"no {program} (Debian: apt-get install chromium chromium-driver)"
    return None


@contextmanager
def open_browser(width: int, dark: bool, downloads: Path | None = None) -> Iterator["Browser"]:
    """A browser with an empty profile and a page `width` pixels wide, always closed."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--hide-scrollbars")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(SECONDS)
        driver.set_script_timeout(60)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """What tests do with a page; every wait is bounded, by `SECONDS` unless it says more."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Load `address`; one that differs after `#` alone shows another view of the same page."""
        self.driver.get(address)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
        """The first true value of `condition`; fails with `what` and the page's text."""
        from selenium.common.exceptions import (
            NoSuchElementException,
            StaleElementReferenceException,
            TimeoutException,
        )
        from selenium.webdriver.support.wait import WebDriverWait

        ignored = [NoSuchElementException, StaleElementReferenceException]
        waiting = WebDriverWait(self.driver, seconds, 0.1, ignored)
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(f"no {what} in {seconds} s on: {self.text()[:2000]}") from None

    def find(self, selector: str, text: str = "") -> Any:
        """The first shown element of a CSS selector that has `text`; waits for it."""

        def look() -> Any:
            found = self.driver.find_elements("css selector", selector)
            return next((e for e in found if text in (e.text or "") and e.is_displayed()), None)

        return self.wait(look, f"{selector} {text!r}")

    def count(self, selector: str) -> int:
        """Number of elements of a CSS selector."""
        return len(self.driver.find_elements("css selector", selector))

    def click(self, selector: str, text: str = "") -> None:
        """Click an element as `find` finds it; again, if the view was refreshed meanwhile."""

        def press() -> bool:
            element = self.find(selector, text)
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            element.click()
            return True

        self.wait(press, f"click on {selector} {text!r}")

    def click_at(self, selector: str, x: int, y: int) -> None:
        """Click `x`, `y` pixels from the upper left corner of an element."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        script = """
            arguments[0].scrollIntoView({block: 'center'});
            const area = arguments[0].getBoundingClientRect();
            return [area.left, area.top];
        """

        def press() -> bool:
            left, top = self.driver.execute_script(script, self.find(selector))
            actions = ActionBuilder(self.driver)
            actions.pointer_action.move_to_location(round(left) + x, round(top) + y).click()
            actions.perform()
            return True

        self.wait(press, f"click into {selector}")

    def labelled(self, label: str) -> Any:
        """The input whose label is `label`."""

        def look() -> Any:
            for element in self.driver.find_elements("css selector", "label[for]"):
                if (element.text or "").strip() == label:
                    return self.driver.find_element("id", element.get_attribute("for"))
            return None

        return self.wait(look, f"input labelled {label!r}")

    def choose(self, label: str, option: str) -> None:
        """Choose the option whose text begins with `option` in the select labelled `label`."""
        from selenium.webdriver.support.select import Select

        def pick() -> bool:
            selection = Select(self.labelled(label))
            for entry in selection.options:
                if entry.text.startswith(option):
                    selection.select_by_visible_text(entry.text)
                    return True
            return False

        self.wait(pick, f"option {option!r} of {label!r}")

    def type(self, label: str, text: str, end: str = "\t") -> None:
        """Replace the text of the input labelled `label`, then press Tab or Enter."""

        def enter() -> bool:
            element = self.labelled(label)
            element.clear()
            element.send_keys(text)
            # Not with the text: what a change of the text does may replace the element.
            self.labelled(label).send_keys(end)
            return True

        self.wait(enter, f"text in {label!r}")

    def press(self, selector: str, *keys: str) -> None:
        """Press keys in an element."""
        self.find(selector).send_keys(*keys)

    def text(self) -> str:
        """The text of the page."""
        return self.driver.find_element("css selector", "body").text

    def errors(self, expected: str = "") -> list[str]:
        """Errors and warnings of the console since the last call, but those with `expected`."""
        levels = ("SEVERE", "WARNING")
        logged = [e["message"] for e in self.driver.get_log("browser") if e["level"] in levels]
        return [message for message in logged if not expected or expected not in message]

    def findings(self) -> list[str]:
        """Serious and critical findings of axe-core on the page as it is."""
        self.driver.execute_script(AXE.read_text())
        result = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']})"
            ".then(done, (error) => done({violations: [{id: String(error), impact: 'critical',"
            " nodes: []}]}));"
        )
        return [
            f"{found['id']}: {[node['html'][:120] for node in found['nodes'][:3]]}"
            for found in result["violations"]
            if found["impact"] in ("serious", "critical")
        ]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        return int(self.driver.execute_script(script))

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG file."""
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        width = self.driver.execute_script("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 6000), "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
        path.write_bytes(base64.b64decode(shot["data"]))
