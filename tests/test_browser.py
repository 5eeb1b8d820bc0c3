"""The report in headless Chromium: nothing is asked of any network, and all can be seen."""

import shutil

import numpy as np
import pytest
from finished_study import write_finished
from test_pages import hostile_record

from normtune import contents, pages
from normtune.reports import content_of
from normtune.suggestion import suggest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="chromium is not installed"),
    pytest.mark.slow,
]

CASES = [("study", (width, scheme)) for width in (360, 1400) for scheme in ("light", "dark")]
CASES += [("hostile", (360, "dark")), ("hostile", (1400, "light"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A report of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "study": content_of(str(write_finished(folder / "study"))),
        "hostile": contents.of_suggestion(suggest(hostile_record(3000))),
    }
    for name, content in made.items():
        (folder / f"{name}.html").write_text(pages.as_html(content), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser, request):
    width, scheme = request.param
    opened = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    yield opened, width, scheme
    opened.close()


@pytest.mark.parametrize(("name", "context"), CASES, indirect=["context"], ids=str)
def test_the_page_is_whole_on_every_screen(name, context, files):
    """No console message, no request but the page itself, no picture out of sight."""
    opened, width, scheme = context
    page = opened.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(files[name].as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [files[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert darkness(page) == scheme
    for picture in page.locator("svg").all():
        assert picture.is_visible()
        box = picture.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        assert box["height"] > 150
    assert words_in_pictures(page) == {page.evaluate("getComputedStyle(document.body).color")}


def words_in_pictures(page):
    """The colours of all words at the axes: the page's own, in light and in dark."""
    fills = "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    found = page.evaluate(fills)
    assert len(found) > 30
    return set(found)


def darkness(page):
    """Whether the page is light or dark where nothing stands, and its text the other way."""
    colors = page.evaluate(
        "['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k])"
    )
    ground, ink = (np.mean([int(p) for p in c[4:-1].split(",")[:3]]) for c in colors)
    return "light" if ground > ink else "dark"


def test_the_printed_page_is_light(files, browser, tmp_path):
    """On paper there is no dark ground, whatever the screen shows."""
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(files["study"].as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert darkness(page) == "light"
    page.pdf(path=tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").stat().st_size > 10_000
    context.close()
