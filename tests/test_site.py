"""The documentation, looked at in a browser. ``make docs`` builds it; .ci/run does so before the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.browser import NARROW, WIDE, Browser, served

SITE = Path(__file__).parents[1] / "out" / "site"
PAGES = ("index", "how", "start-torch", "commands", "api", "benchmarks", "troubleshooting")


@pytest.fixture
def site() -> Path:
    if not (SITE / "index.html").is_file():
        pytest.skip("the documentation has not been built; make docs")
    return SITE


@contextmanager
def opened(browser: Browser, site: Path, name: str, **look: Any) -> Iterator[str]:
    """Open a page at an address of its own: the theme remembers there which colours were preferred."""
    with served(site) as address:
        browser.open(f"{address}{name}.html", **look)
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window_and_can_be_read(browser: Browser, site: Path, name: str) -> None:
    """It asks nothing of the network."""
    for size, dark in ((WIDE, False), (WIDE, True), (NARROW, False), (NARROW, True)):
        with opened(browser, site, name, size=size, dark=dark) as address:
            scheme = browser.run("return document.body.dataset.mdColorScheme")
            assert scheme == ("slate" if dark else "default")
            assert browser.overflow() <= 0, f"{name} scrolls sideways in a window of {size}"
            assert browser.messages() == []
            if size == WIDE:  # the theme's own structure is not ours to mend
                assert browser.violations(["color-contrast"]) == []
            fetched = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
            assert fetched
            assert [place for place in fetched if not place.startswith((address, "data:"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_pictures_and_formulas_are_shown(browser: Browser, site: Path, dark: bool) -> None:
    with opened(browser, site, "how", dark=dark):
        visible = browser.run(
            "return [...document.querySelectorAll('.md-content img')].filter(i => i.offsetHeight > 100)"
            ".map(i => [i.getAttribute('src'), i.complete && i.naturalWidth > 0])"
        )
        formulas = browser.run("return document.querySelectorAll('math').length")
    assert len(visible) == 6
    assert all(loaded for _, loaded in visible)
    assert all(("-dark.svg" in source) == dark for source, _ in visible)
    assert formulas > 10
