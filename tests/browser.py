"""A headless Chromium that opens pages as people do: for reports, and for a site in a folder."""

from __future__ import annotations

import base64
import contextlib
import functools
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WIDE, NARROW = (1280, 800), (390, 844)


class Browser:
    """One window, and what can be asked of the page in it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        driver.set_script_timeout(300)  # axe-core on a long page, beside other work

    def open(
        self,
        page: Path | str,
        *,
        size: tuple[int, int] = WIDE,
        dark: bool = False,
        fresh: bool = True,
    ) -> None:
        """Open a file or an address in a window of some size, for someone who likes it light or dark.

        ``fresh`` forgets what earlier pages have stored.
        """
        if fresh:
            self.run("try { localStorage.clear() } catch (error) { /* a page that has none */ }")
        self.media(prefers="dark" if dark else "light")
        self._cdp(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=size[0] < 600,
        )
        self.messages()  # of the page before
        self.driver.get(page if isinstance(page, str) else page.resolve().as_uri())

    def media(self, prefers: str = "light", kind: str = "screen") -> None:
        """Say what the page is shown on, and which colours are preferred."""
        self._cdp(
            "Emulation.setEmulatedMedia",
            media=kind,
            features=[{"name": "prefers-color-scheme", "value": prefers}],
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """Every element that a CSS selector finds."""
        return self.driver.find_elements("css selector", selector)  # type: ignore[no-any-return]

    def messages(self) -> list[str]:
        """What was written to the console since it was last asked for."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.run(  # type: ignore[no-any-return]
            "const d = document.documentElement; return Math.max(d.scrollWidth, document.body.scrollWidth)"
            " - d.clientWidth"
        )

    def violations(self, rules: Sequence[str] = ()) -> list[str]:
        """What axe-core finds wrong with a page's accessibility, contrast included, by all rules or some."""
        from axe_core_python.selenium import Axe

        found = Axe().run(self.driver, options={"runOnly": list(rules)} if rules else None)["violations"]
        return [
            f"{rule['id']}: {node['target']} {node['failureSummary']}"
            for rule in found
            for node in rule["nodes"]
        ]

    def faint_texts(self, least: float = 4.5) -> list[str]:
        """Texts of drawings, which axe-core does not judge, with too little contrast to what is behind."""
        return self.run(_FAINT, least)  # type: ignore[no-any-return]

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self._cdp("Page.printToPDF", printBackground=True)["data"])

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self._cdp("Page.captureScreenshot", format="png")["data"]))

    def _cdp(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)


_FAINT = """
const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => {
    v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = parse(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const faint = [];
for (const text of document.querySelectorAll("svg text")) {
  const [a, b] = [light(parse(getComputedStyle(text).fill)), light(behind(text))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < arguments[0]) faint.push(text.textContent + " " + ratio.toFixed(2));
}
return faint;
"""


@contextlib.contextmanager
def started(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile.

    Where there is none the test is skipped; .ci/run makes sure that there is one.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium; pip install '.[test]'")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield Browser(window)
    finally:
        window.quit()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine, and yield its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
