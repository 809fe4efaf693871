"""The pages in a browser: what people see, press and print. Chromium is needed; .ci/run sees to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from netdecouple import api
from netdecouple.report.html import inspect_html, report_html, sweep_html
from netdecouple.report.model import Report
from netdecouple.report.sweep import Sweep
from tests import networks
from tests.browser import NARROW, WIDE, Browser, served
from tests.report.conftest import hostile

IN_SIGHT = """
const box = arguments[0].getBoundingClientRect();
return box.width > 0 && box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth;
"""


PAPER = (700, 990)  # of A4, between the margins, in CSS pixels
WIDER = "return arguments[0].scrollWidth > arguments[0].clientWidth"


@pytest.fixture(scope="session", params=["report", "inspect", "sweep"])
def page(
    request: pytest.FixtureRequest, full_report: Report, sweep: Sweep, write_page: Callable[[str], Path]
) -> Path:
    """Every kind of page, full of names that are markup."""
    made = {
        "report": lambda: report_html(full_report),
        "inspect": lambda: inspect_html(api.inspect(hostile(networks.classifier()))),
        "sweep": lambda: sweep_html(sweep),
    }
    return write_page(made[request.param]())


@pytest.fixture(scope="session")
def report_page(full_report: Report, write_page: Callable[[str], Path]) -> Path:
    return write_page(report_html(full_report))


@pytest.fixture(scope="session")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo ends with, for MACs that every machine can save."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "netdecouple", "demo", "--macs", "50%", "-o", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "150"})
    assert ended.returncode == 0, ended.stderr
    last = ended.stdout.rstrip().splitlines()[-1]
    assert last.endswith(str(folder / "report.html"))
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_pages_are_accessible(browser: Browser, page: Path, size: tuple[int, int], dark: bool) -> None:
    """Nothing on the console, no sideways scrolling, nothing that axe-core objects to, contrast included."""
    browser.open(page, size=size, dark=dark)
    assert browser.messages() == []
    assert browser.overflow() == 0
    assert browser.violations() == []
    assert browser.faint_texts() == []
    assert browser.run("return window.broken") is None


def test_the_checks_would_find_something(browser: Browser, write_page: Callable[[str], Path]) -> None:
    """A page with every fault that the test above looks for."""
    browser.open(
        write_page(
            "<!DOCTYPE html><title>x</title><p style='color:#bbb;background:#fff'>faint</p>"
            "<svg><text fill='#bbb'>faint</text></svg><div style='width:2000px'>wide</div>"
            "<script>console.error('lost')</script>"
        )
    )
    assert any("lost" in message for message in browser.messages())
    assert browser.overflow() > 0
    found = browser.violations()
    assert any(v.startswith("color-contrast") for v in found)
    assert any(v.startswith("html-has-lang") for v in found)
    assert browser.faint_texts() == ["faint 1.92"]


def test_every_drawing_has_words(browser: Browser, page: Path) -> None:
    """Its role, its name and its description, which are not empty; a figure's numbers are in a table too."""
    browser.open(page)
    drawings = browser.all("svg")
    assert drawings
    for drawing in drawings:
        assert drawing.get_attribute("role") == "img"
        assert drawing.accessible_name.strip()
        text = "return arguments[0].querySelector(arguments[1]).textContent"
        title, description = (browser.run(text, drawing, part) for part in ("title", "desc"))
        assert title.strip()
        assert any(c.isdigit() for c in description)
    assert browser.run(
        "return [...document.querySelectorAll('img')].every(i => i.alt && i.complete && i.naturalWidth > 0)"
    )


COLUMN = """
const table = document.querySelectorAll("table.sortable")[arguments[0]];
const cells = [...table.tBodies[0].rows].map((row) => row.cells[arguments[1]]);
const values = cells.map((cell) => cell.dataset.value ?? cell.textContent.trim());
const button = table.tHead.querySelectorAll("button")[arguments[1]];
button.scrollIntoView({ block: "center", behavior: "instant" });
return {
  values,
  numeric: cells.every((cell) => cell.dataset.value !== undefined),
  natural: values.filter((value) => value).sort(new Intl.Collator("en", { numeric: true }).compare),
  said: [...table.tHead.querySelectorAll("th")].map((head) => head.getAttribute("aria-sort")),
};
"""


@pytest.mark.parametrize("press", ["click", "enter", "space"])
def test_every_column_sorts(browser: Browser, page: Path, press: str) -> None:
    """Rising, then falling, by mouse and by keyboard; what is empty comes last; one column says so."""
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    for at, table in enumerate(browser.all("table.sortable")):
        buttons = table.find_elements("css selector", "thead button")
        for index, button in enumerate(buttons if press == "click" else buttons[:3]):
            before = browser.run(COLUMN, at, index)  # scrolls the button into view, too
            assert len(before["said"]) == len(buttons)
            for direction in ("ascending", "descending"):
                if press == "click":
                    button.click()
                else:
                    button.send_keys(Keys.ENTER if press == "enter" else Keys.SPACE)
                after = browser.run(COLUMN, at, index)
                assert after["said"] == [direction if i == index else None for i in range(len(buttons))]
                values = after["values"]
                assert sorted(values) == sorted(before["values"])
                filled = [v for v in values if v]
                assert values[: len(filled)] == filled
                if after["numeric"]:
                    rising: list[object] = sorted(map(float, filled))
                    found: list[object] = [float(v) for v in filled]
                else:
                    rising, found = after["natural"], filled
                assert found == rising if direction == "ascending" else found[::-1] == rising
    assert browser.messages() == []


def test_rows_stay_whole(browser: Browser, report_page: Path) -> None:
    """Sorting moves rows, not cells; the sums below stay below."""
    browser.open(report_page)
    rows = "return [...document.querySelectorAll('#layers tbody tr')].map(r => r.innerText)"
    before = browser.run(rows)
    button = browser.all("#layers thead button")[4]
    browser.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()
    assert sorted(browser.run(rows)) == sorted(before)
    assert "all nodes" in browser.all("#layers tfoot")[0].text


def test_the_scheme_can_be_switched(browser: Browser, page: Path) -> None:
    """As the system has it, until somebody presses the button; the choice is kept."""
    shown = "return getComputedStyle(document.body).backgroundColor"
    browser.open(page, dark=True)
    dark = browser.run(shown)
    browser.open(page)
    light = browser.run(shown)
    assert light != dark
    (button,) = browser.all("#theme")
    assert button.text == "Dark"
    button.click()
    assert browser.run(shown) == dark
    assert button.accessible_name == "Switch to the light scheme"
    for _ in range(120):  # the choice reaches the disk when Chromium finds the time
        browser.open(page, fresh=False)
        if browser.run(shown) == dark:
            break
        time.sleep(0.25)
    assert browser.run(shown) == dark
    assert browser.violations() == []


def test_the_keyboard_reaches_everything(browser: Browser, report_page: Path) -> None:
    """A way past the links at the top; boxes that scroll can be scrolled; drawings can be folded away."""
    from selenium.webdriver.common.keys import Keys

    browser.open(report_page, size=NARROW)
    browser.all("body")[0].send_keys(Keys.TAB)
    active = "return document.activeElement"
    assert browser.run(active).text == "Skip to the report"
    boxes = [box for box in browser.all(".scroll") if box.is_displayed()]
    for box in boxes:
        assert box.get_attribute("tabindex") == "0"
        assert box.accessible_name
    wide = [b for b in boxes if browser.run(WIDER, b)]
    assert wide
    for box in wide:
        browser.run("arguments[0].focus()", box)
        assert browser.run("return document.activeElement === arguments[0]", box)
    folded = browser.all("#layers details")[-1]
    is_open = browser.run("return arguments[0].open", folded)
    folded.find_element("css selector", "summary").send_keys(Keys.ENTER)
    assert browser.run("return arguments[0].open", folded) is not is_open


def test_pages_print(browser: Browser, page: Path) -> None:
    """On white, as wide as the paper, without what only a screen can do; dark schemes do not come along."""
    browser.open(page, dark=True, size=PAPER)
    browser.media(prefers="dark", kind="print")
    try:
        shown = browser.run(
            "const s = (q, p) => getComputedStyle(document.querySelector(q))[p];"
            "return [s('body', 'backgroundColor'), s('#theme', 'display'), s('.bar nav', 'display'),"
            " s('.scroll', 'overflowX')]"
        )
        assert shown == ["rgb(255, 255, 255)", "none", "none", "visible"]
        assert browser.overflow() == 0
        assert browser.faint_texts() == []
        assert browser.pdf().startswith(b"%PDF-")
    finally:
        browser.media()


def test_printing_unfolds_all(browser: Browser, report_page: Path) -> None:
    browser.open(report_page)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = false)")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return [...document.querySelectorAll('details')].every(d => d.open)")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_demos_first_screen_tells_gain_and_loss(browser: Browser, demo_page: Path, dark: bool) -> None:
    """Without scrolling, at 1280 × 800: every number that was gained and every one that was lost."""
    browser.open(demo_page, size=WIDE, dark=dark)
    facts = browser.all(".fact")
    assert len(facts) >= 7
    for fact in facts:
        assert browser.run(IN_SIGHT, fact), fact.text
    said = " ".join(fact.text for fact in facts)
    for part in ("fewer MACs", "fewer parameters", "bytes", "points of accuracy", "get another class", "KL"):
        assert part in said
    assert "time" in said or "faster" in said or "slower" in said
    assert browser.run("return scrollY") == 0
    assert browser.messages() == []
    assert browser.violations() == []


@pytest.mark.slow
def test_the_demos_report_has_everything(browser: Browser, demo_page: Path) -> None:
    """Both schemes are legible, it fits a telephone, and its data lie beside it."""
    report = Report.from_json((demo_page.parent / "report.json").read_text(encoding="utf-8"))
    assert report.benchmark is not None
    assert len(report.disagreements) == 8
    for dark in (False, True):
        browser.open(demo_page, size=NARROW, dark=dark)
        assert browser.overflow() == 0
        assert browser.violations() == []
        assert browser.faint_texts() == []
    assert len(browser.all(".samples img")) == 8


def test_screenshots_are_taken(browser: Browser, report_page: Path, tmp_path: Path) -> None:
    """In the window's size, and the dark one is darker: for those who look at them."""
    means = []
    for dark in (False, True):
        browser.open(report_page, size=WIDE, dark=dark)
        browser.screenshot(tmp_path / "seen.png")
        with Image.open(tmp_path / "seen.png") as seen:
            assert seen.size == WIDE
            means.append(np.asarray(seen.convert("L")).mean())
    assert means[1] < 80 < 200 < means[0]


def test_a_folder_can_be_served(browser: Browser, report_page: Path) -> None:
    """For sites of several pages."""
    with served(report_page.parent) as address:
        browser.open(f"{address}{report_page.name}")
        assert browser.all("h1")
        assert browser.messages() == [] or all("favicon" in message for message in browser.messages())
