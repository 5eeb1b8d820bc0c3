"""Reports: one page that needs nothing else, and the same in Markdown, text and JSON."""

import builtins
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from finished_study import NORMS
from test_results import helped  # noqa: F401  a fixture

from normtune import contents, pages
from normtune.errors import NormtuneError
from normtune.pictures import VARIABLES, check, svg
from normtune.records import NormRecord, Origin
from normtune.suggestion import suggest

pytest.importorskip("matplotlib")

HOSTILE = (
    "<script>alert(1)</script> & \"q\" 'a' </title> --> ]]> {{ 7*7 }} $x$ `c` |p| "
    "\x1b[31mred\x07 \u202eback \u6f22\u5b57 **b**"
)


def hostile_record(n=400):
    """Every name in it wants to break the page."""
    norms = np.random.default_rng(0).lognormal(size=n)
    norms[7] = np.nan
    origin = Origin(path=f"{HOSTILE}.csv", kind=HOSTILE, key=HOSTILE, notes=(HOSTILE,) * 40)
    known = {"optimizer": f"SGD {HOSTILE}", "torch": HOSTILE, "dtype": HOSTILE}
    record = NormRecord.of(norms, lr=0.1, series=HOSTILE, metadata=known, origin=origin)
    groups = {f"{HOSTILE}.{i}": norms * (i + 1) for i in range(3)}
    return dataclasses.replace(record, groups=groups)


@pytest.fixture(scope="module")
def hostile():
    return contents.of_suggestion(suggest(hostile_record()), command=f"normtune report '{HOSTILE}'")


@pytest.fixture(scope="module")
def hostile_page(hostile):
    return pages.as_html(hostile)


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_names_are_text_and_never_tags(hostile_page):
    """Tags, quotes, template braces and comment ends of a log stay what they are."""
    page = Tags(hostile_page)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert hostile_page.count("</title>") == 1


@pytest.mark.parametrize("form", pages.FORMS)
def test_no_control_character_is_left_in_any_form(form, hostile):
    """Neither ESC nor BEL nor a direction override reaches a page or a terminal."""
    text = pages.FORMS[form](hostile)
    assert not set("\x1b\x07\u202e") & set(text)


def test_the_page_loads_nothing(hostile_page):
    """No address but its own: no script, no font, no picture from elsewhere."""
    page = Tags(hostile_page)
    links = [a[k] for _, a in page.tags for k in ("src", "href", "xlink:href") if k in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in hostile_page
    assert "url(" not in re.sub(r"url\(#", "", hostile_page)
    policy = dict(t for t in page.tags if t[0] == "meta" and "http-equiv" in t[1])
    assert "default-src 'none'" in policy["meta"]["content"]


def test_ids_are_unique_and_every_reference_has_its_id(hostile_page):
    """Several pictures live in one page."""
    page = Tags(hostile_page)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', hostile_page)
    assert set(used) <= set(ids)


def test_every_picture_has_words_and_follows_the_page(hostile_page):
    """Each picture is named for those who cannot see it; its colours are the page's own."""
    pictures = [a for tag, a in Tags(hostile_page).tags if tag == "svg"]
    assert len(pictures) == 4
    assert all(p["role"] == "img" and len(p["aria-label"]) > 20 for p in pictures)
    drawn = "".join(re.findall(r"<svg.*?</svg>", hostile_page, re.DOTALL))
    assert not set(re.findall(r"#[0-9a-f]{6}", drawn)) & set(VARIABLES)
    for name in set(re.findall(r"var\((--[a-z]+)\)", hostile_page)):
        assert len(re.findall(rf"{name}: ", hostile_page)) >= 1, name


def test_headings_come_in_order(hostile_page):
    """One h1, then h2s; tables have captions and scoped headings."""
    tags = Tags(hostile_page).tags
    levels = [tag for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == "h1"
    assert set(levels[1:]) == {"h2"}
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags)
    assert all("scope" in a for tag, a in tags if tag == "th")


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_have_contrast_in_light_and_in_dark(hostile_page):
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    roots = re.findall(r":root \{(.*?)\}", hostile_page, re.DOTALL)
    assert len(roots) == 2
    for root in roots:
        colors = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", root))
        for name in ("ink", "soft", "answer"):
            assert contrast(colors[name], colors["paper"]) >= 4.5, name
            assert contrast(colors[name], colors["ground"]) >= 4.5, name
        for name in ("blue", "orange", "green", "purple", "sky", "red", "grey"):
            assert contrast(colors[name], colors["paper"]) >= 3, name


def test_the_suggestion_is_answered_at_a_glance():
    """The number, its table, its doubts, the code to paste, the command and the versions."""
    s = suggest(NORMS, optimizer="SGD")
    page = Tags(pages.as_html(contents.of_suggestion(s, command="normtune report a.csv"))).text
    assert f"suggested max_norm {s.max_norm:g}" in page
    assert all(c.name in page for c in s.candidates)
    assert all(doubt in page for doubt in s.doubts)
    assert f"max_norm={s.max_norm:g}" in page
    assert "normtune report a.csv" in page
    assert f"numpy{np.__version__}" in re.sub(r"\s", "", page)
    assert "lowered for the big gradients only" in page


@pytest.mark.parametrize("form", ["html", "markdown", "text"])
def test_the_verdict_is_answered_at_a_glance(form, helped):  # noqa: F811
    """The sentence, every arm, every training and what the suggestion does, in each form."""
    said = pages.FORMS[form](contents.of_result(helped, command="normtune report s.yaml"))
    text = Tags(said).text if form == "html" else said.replace("\\", "")
    flat = re.sub(r"\s+", " ", text)
    assert helped.verdict.sentence in flat
    assert "The suggestion 0.5 helps against no clipping" in flat
    assert all(arm.label in flat for arm in helped.verdict.arms)
    assert "a note" in flat
    assert flat.count("confirm") == sum(t.stage == "confirm" for t in helped.trials)


def test_json_holds_the_values_and_is_strict(helped):  # noqa: F811
    """The same numbers as the API gives."""

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(pages.as_json(contents.of_result(helped)), parse_constant=refuse)
    assert found["result"] == json.loads(json.dumps(helped.to_dict()))
    s = suggest(NORMS)
    found = json.loads(pages.as_json(contents.of_suggestion(s)), parse_constant=refuse)
    assert found["suggestion"]["max_norm"] == s.max_norm
    assert found["versions"]["numpy"] == np.__version__


def test_markdown_shows_names_as_they_are(hostile):
    """No tag, no emphasis, no cell and no fence can be opened by a name."""
    said = pages.as_markdown(hostile)
    outside = "".join(re.split(r"^(````*)\n.*?^\1$", said, flags=re.DOTALL | re.MULTILINE)[::2])
    assert "<script>" not in outside
    assert r"\*\*b\*\*" in said
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 7}
    assert "`c`" not in outside


def test_the_text_form_keeps_to_its_width():
    """Sentences are wrapped."""
    said = pages.as_text(contents.of_suggestion(suggest(NORMS)), width=60)
    prose = [line for line in said.splitlines() if not line.startswith("  ")]
    assert max(map(len, prose)) <= 60


def test_a_list_from_a_file_cannot_flood_the_page(hostile):
    """At most 30 sentences of one kind, each at most 300 characters."""
    run = next(s for s in hostile.sections if s.heading == "The run")
    assert sum(name == "note" for name, _ in run.table.rows) == 30
    assert max(len(cell) for row in run.table.rows for cell in row) <= 300


def test_a_long_study_shows_its_first_trainings(helped):  # noqa: F811
    """The page stays small; the JSON form has them all."""
    many = dataclasses.replace(helped, trials=helped.trials[:1] * 1000)
    content = contents.of_result(many)
    table = next(s for s in content.sections if s.heading == "Every training")
    assert len(table.table.rows) == contents.MOST_TRIALS
    assert "800 more" in table.closing
    assert len(content.data["result"]["trials"]) == 1000


def test_a_million_steps_make_a_small_page():
    """What is drawn does not grow with the number of steps."""
    norms = np.random.default_rng(0).lognormal(size=1_000_000)
    page = pages.as_html(contents.of_suggestion(suggest(NormRecord.of(norms, lr=0.1))))
    assert len(page.encode()) < 1_000_000
    assert page.count("<use") < 5000


def test_without_jinja2_or_matplotlib_the_line_says_what_to_install(monkeypatch, hostile):
    """The other forms need neither."""
    real = builtins.__import__

    def without(missing):
        def importing(name, *args, **kwargs):
            if name.split(".")[0] == missing:
                raise ImportError(name)
            return real(name, *args, **kwargs)

        return importing

    for missing in ("jinja2", "matplotlib"):
        monkeypatch.setattr(builtins, "__import__", without(missing))
        with pytest.raises(NormtuneError, match=rf"{missing}.*normtune\[plot\]"):
            pages.as_html(hostile)
        assert pages.as_text(hostile)
        monkeypatch.undo()


def test_a_picture_is_one_element_with_ids_of_its_own():
    """It can stand in a page beside itself."""
    first, second = (
        svg(lambda ax: ax.plot([1, 2], [3, 4]), name=name, alt="a 'line' & more") for name in "ab"
    )
    assert first.startswith('<svg role="img" aria-label="a &#x27;line&#x27; &amp; more" viewBox="')
    assert first.endswith("</svg>")
    ids = [set(re.findall(r'id="([^"]+)"', picture)) for picture in (first, second)]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("name", ["a.docx", "a", "nowhere/a.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(name, tmp_path):
    """Hours of training do not end in a wrong suffix."""
    with pytest.raises(NormtuneError, match="cannot draw to"):
        check(tmp_path / name)
