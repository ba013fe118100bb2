"""The page in a real Chromium."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from report.browser import Page, chromium, opened

from repblocks.report.facts import Facts
from repblocks.report.page import render

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium here: apt-get install chromium")

FIRST_COLUMN = "[...document.querySelectorAll('#blocks tbody tr')].map(row => row.cells[0].textContent)"
COLUMN = "[...document.querySelectorAll('#blocks tbody tr')].map(row => Number(row.cells[{}].dataset.value))"
SORTED_BY = "[...document.querySelectorAll('#blocks th[aria-sort]')].map(header => header.ariaSort)"
STATUS = "document.getElementById('blocks-status').textContent"

OUTLINE = "getComputedStyle(document.querySelector('#blocks th button')).outlineStyle"
ACCENT = "getComputedStyle(document.querySelector('nav a')).color"
TO_SCROLL = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    executable = chromium()
    assert executable is not None
    with opened(executable, tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Page, page: str, tmp_path: Path) -> Page:
    """The report, freshly loaded."""
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    browser.prefer("light")
    browser.open(path)
    return browser


def test_the_page_asks_for_nothing_and_logs_nothing(tab: Page) -> None:
    assert tab.run("document.readyState") == "complete"
    assert tab.requests == []
    assert tab.complaints == []


def test_a_fault_in_the_page_would_be_seen(tab: Page, tmp_path: Path) -> None:
    faulty = tmp_path / "faulty.html"
    faulty.write_text("<script>undefined.x</script><img src='http://127.0.0.1:9/x.png'>", encoding="utf-8")
    tab.open(faulty)
    try:
        assert any("TypeError" in complaint for complaint in tab.complaints)
        assert tab.requests == ["http://127.0.0.1:9/x.png"]
    finally:
        tab.complaints.clear()
        tab.requests.clear()


def test_the_keyboard_sorts_the_table_by_numbers_largest_first(tab: Page) -> None:
    tab.run("document.querySelectorAll('#blocks th button')[4].focus()")  # parameters of the train form
    tab.press("Enter")
    falling = tab.run(COLUMN.format(4))
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) > 1
    tab.press(" ")
    assert tab.run(COLUMN.format(4)) == falling[::-1]
    assert tab.run(SORTED_BY) == ["none"] * 4 + ["ascending"] + ["none"] * 6
    assert tab.run(STATUS) == "Sorted by parameters, train, ascending."


def test_small_errors_sort_by_value_and_not_as_text(facts: Facts, tmp_path: Path, browser: Page) -> None:
    sizes = (9e-8, 2e-7, 1e-6, 0.0)
    errors = [replace(block.error, border=size, interior=0.0) for block, size in zip(facts.blocks, sizes, strict=True)]
    blocks = tuple(replace(block, error=error) for block, error in zip(facts.blocks, errors, strict=True))
    path = tmp_path / "report.html"
    path.write_text(render(replace(facts, blocks=blocks)), encoding="utf-8")
    browser.open(path)
    browser.run("document.querySelectorAll('#blocks th button')[3].click()")
    assert browser.run(COLUMN.format(3)) == [1e-6, 2e-7, 9e-8, 0]


def test_the_first_column_sorts_in_the_order_of_the_model(tab: Page) -> None:
    original = tab.run(FIRST_COLUMN)
    tab.run("document.querySelectorAll('#blocks th button')[5].click()")
    assert tab.run(FIRST_COLUMN) != original
    tab.run("document.querySelectorAll('#blocks th button')[0].click()")
    assert tab.run(FIRST_COLUMN) == original


def test_tab_goes_from_one_column_title_to_the_next(tab: Page) -> None:
    tab.run("document.querySelector('#blocks th button').focus()")
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "class"


def test_a_column_title_that_has_the_focus_is_outlined(tab: Page) -> None:
    assert tab.run(OUTLINE) == "none"
    tab.run("document.querySelector('#blocks .scroll').focus()")
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "block"
    assert tab.run(OUTLINE) == "solid"
    assert tab.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    assert tab.run("getComputedStyle(document.activeElement).outlineColor") == tab.run(ACCENT)


@pytest.mark.parametrize("width", [1024, 1100, 1280])
def test_tables_fit_into_an_ordinary_window(browser: Page, repnext_facts: Facts, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(repnext_facts), encoding="utf-8")
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    try:
        browser.open(path)
        assert browser.run("document.querySelectorAll('.scroll').length") == 3
        assert browser.run(TO_SCROLL) == []
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
    assert browser.complaints == []


def test_dark_and_light_are_readable(tab: Page) -> None:
    for scheme in ("light", "dark"):
        tab.prefer(scheme)
        assert tab.run(CONTRAST) >= 4.5, scheme


def test_text_in_figures_has_the_colours_of_the_page(tab: Page) -> None:
    color = "getComputedStyle(document.querySelector('#figure-block text')).fill"
    light = tab.run(color)
    tab.prefer("dark")
    assert tab.run(color) != light
    assert tab.run(color) == tab.run("getComputedStyle(document.body).color")


def test_no_text_of_a_figure_is_outside_of_it(tab: Page) -> None:
    assert tab.run("document.querySelectorAll('figure svg text').length") > 50
    assert tab.run(OUTSIDE) == []


def test_the_page_is_no_wider_than_a_narrow_window(tab: Page) -> None:
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    tab.call("Emulation.setDeviceMetricsOverride", **size)
    try:
        assert tab.run("document.documentElement.scrollWidth") <= 390
    finally:
        tab.call("Emulation.clearDeviceMetricsOverride")


def test_paper_is_white_also_for_those_who_read_in_the_dark(tab: Page) -> None:
    tab.prefer("dark", media="print")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.pdf().startswith(b"%PDF")


def test_a_screenshot_shows_the_whole_page(tab: Page) -> None:
    picture = tab.screenshot()
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 1000
    assert height >= 2000


#: The lowest contrast of text and background, by the formula of WCAG 2.
CONTRAST = """
(() => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const weights = [0.2126, 0.7152, 0.0722];
  const light = color => weights.reduce((total, weight, at) => total + weight * linear(parts(color)[at]), 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((parts(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const ratio = element => {
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  return Math.min(...[...document.querySelectorAll("h1, h2, h3, p, td, th, dt, dd, a, figcaption")].map(ratio));
})()
"""

OUTSIDE = """
[...document.querySelectorAll("figure svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    const beside = box.left < frame.left - 1 || box.right > frame.right + 1;
    return beside || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
})
"""
