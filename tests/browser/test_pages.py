"""The report's pages, looked at in a browser as people do: on a telephone at night, and on a desk by day."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import chromium
import pytest
import runs
from chromium import Chromium, Screen

from trimtab.report import attempt_html, summary_html

FAULTS = (Path(__file__).parent / "faults.js").read_text()
SCREENS = (
    Screen("telephone at night", 390, 844, "dark", mobile=True),
    Screen("desk by day", 1440, 900, "light"),
)
FULL = {"kernels": runs.KERNELS, "layers": runs.LAYERS, "calibration": runs.CALIBRATION}
MEASURED = runs.state(verdict=runs.BASELINE.verdict, seconds=runs.BASELINE.seconds)
HOSTILE = runs.hostile(runs.RELEASED)
PAGES: dict[str, str] = {
    **{f"summary, {name}": summary_html(state) for name, state in runs.STATES.items()},
    "summary, hostile": summary_html(HOSTILE),
    "attempt, baseline": attempt_html(MEASURED, runs.KERNELS),
    "attempt, accepted": attempt_html(runs.RELEASED, **FULL),
    "attempt, distilled": attempt_html(runs.DISTILLED, **FULL, distillation=runs.DISTILLATION),
    "attempt, indeterminate": attempt_html(runs.NOTHING_ACCEPTED),
    "attempt, not loaded": attempt_html(runs.NO_GAIN, reload={"skipped": "a head that caps its logits"}),
    "attempt, stage failed": attempt_html(runs.STAGE_FAILED),
    "attempt, not judged": attempt_html(runs.EMPTY),
    "attempt, hostile": attempt_html(HOSTILE),
}
#: The body of a page with a fault, and what is said of it.
FAULTY = [
    ('<div style="width: 2000px">wide</div>', "the page is 2008 px wide"),
    ('<figure style="overflow: auto"><div style="width: 2000px">wide</div></figure>', "scrolls, where there is room"),
    ('<p style="position: absolute">one</p><p style="position: absolute">two</p>', "one covers the other: one | two"),
    ('<div style="width: 20px; overflow: hidden"><nobr>too long</nobr></div>', "cut off: too long"),
    ('<svg width="90"><rect width="9" height="9"/><text x="70" y="20">outside</text></svg>', "cut off: outside"),
    ('<p style="color: #888">faint</p>', "contrast 3.54 of rgb(136, 136, 136) on rgb(255,255,255): faint"),
    ('<p style="background: linear-gradient(#333, #333)">dark</p>', "contrast 1.66 of rgb(0, 0, 0) on rgb(51,51,51)"),
    ('<p style="font-size: 7px">fine print</p>', "too small to read, 7.0 px: fine print"),
    ('<svg width="40" height="40"></svg>', "a blank picture: <svg"),
    ('<svg width="0" height="0"></svg>', "a picture without size: <svg"),
    ('<img src="data:image/png;base64,AAAA" alt="">', "does not load: data:image/png"),
    ('<a href="#nowhere">there</a>', "leads nowhere: #nowhere"),
    ("<script>console.error('broken')</script>", "complains: broken"),
    ("<script>throw new Error('thrown')</script>", "complains: Uncaught"),
    ('<link rel="stylesheet" href="http://127.0.0.1:9/style.css">', "fetches: http://127.0.0.1:9/style.css"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    program = chromium.program()
    if not program:
        pytest.skip("Chromium is not installed")
    running = Chromium(program)
    yield running
    running.close()


@pytest.fixture
def faults(browser: Chromium, tmp_path: Path) -> Callable[[str, Screen], list[str]]:
    """A function: what is wrong with a page on a screen; then its picture, page.png, stays in pytest's folder."""

    def find(page: str, screen: Screen) -> list[str]:
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        shown = browser.open(file, screen)
        laid_out = browser.evaluate(f"{FAULTS}; lay_out()")
        browser.evaluate("hide_texts()")
        picture = base64.b64encode(browser.picture()).decode()
        seen = browser.evaluate(f"look({json.dumps(laid_out['texts'])}, '{picture}')")
        fetched = [f"fetches: {url}" for url in shown.requests if not url.startswith("data:")]
        found = [*fetched, *(f"complains: {words}" for words in shown.complaints), *laid_out["faults"], *seen]
        if found:
            browser.open(file, screen)
            (tmp_path / "page.png").write_bytes(browser.picture())
        return found

    return find


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.name)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_fault(faults, name, screen):
    assert faults(PAGES[name], screen) == []


@pytest.mark.parametrize(("body", "said"), FAULTY, ids=[said for _, said in FAULTY])
def test_a_fault_is_found(faults, body, said):
    page = f"<!doctype html><html><head><meta charset=utf-8><title>fault</title></head><body>{body}</body></html>"
    found = faults(page, SCREENS[1])
    assert any(fault.startswith(said) for fault in found), found


def test_a_page_without_a_fault_has_none(faults):
    page = "<!doctype html><title>fine</title><h1 id=top>Fine</h1><p>Back to the <a href='#top'>top</a>.</p>"
    assert [faults(page, screen) for screen in SCREENS] == [[], []]
