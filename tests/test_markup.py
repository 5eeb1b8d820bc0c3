"""What notebooks show of records, suggestions and results."""

import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from test_pages import HOSTILE, Tags, hostile_record
from test_results import helped  # noqa: F401  a fixture

from normtune import markup
from normtune.records import NormRecord
from normtune.suggestion import suggest


def test_a_record_shows_its_norms():
    """Steps, extremes, what was not finite, and a line of the norms."""
    norms = np.r_[np.geomspace(0.5, 80.0, 500), np.nan]
    page = Tags(NormRecord.of(norms)._repr_html_())
    assert "steps501" in page.text
    assert "largest norm80" in page.text
    assert "not finite1" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 1


def test_a_result_shows_its_sentence_and_arms(helped):  # noqa: F811
    """The verdict, what it says of the suggestion, and a row an arm."""
    page = Tags(helped._repr_html_())
    assert helped.verdict.sentence in page.text
    assert all(arm.label in page.text for arm in helped.verdict.arms)
    assert sum(tag == "tr" for tag, _ in page.tags) == 1 + len(helped.verdict.arms) + len(
        helped.verdict.explored
    )


def test_names_are_escaped_in_a_notebook():
    """A name from a log is text there, too."""
    record = hostile_record()
    for shown in (record, suggest(record)):
        page = Tags(shown._repr_html_())
        assert "script" not in {tag for tag, _ in page.tags}
        assert "<script>alert(1)</script>" in page.text
        assert "\x1b" not in page.text
    assert markup.text(HOSTILE).startswith("&lt;script&gt;")


@pytest.mark.parametrize("norms", [[], [0.0], [np.nan], [1.0], [1e-300, 1e300]])
def test_a_sparkline_is_sound_for_any_norms(norms):
    """It is XML within its box, or nothing where there is nothing to draw."""
    drawn = markup.sparkline(np.array(norms, dtype=float), 'a "label"')
    if not drawn:
        return
    path = ET.fromstring(drawn)[0].get("d")  # noqa: S314  our own text
    heights = [float(part.split()[-1]) for part in path.replace("M", " M").split("V")[1:]]
    assert all(0 <= h <= markup.HEIGHT for h in heights)


def test_a_notebook_needs_no_matplotlib_for_them():
    """They are light: plain text and a path."""
    probe = (
        "import sys, numpy as np; from normtune import suggest, NormRecord\n"
        "r = NormRecord.of(np.random.default_rng(0).lognormal(size=99))\n"
        "r._repr_html_(); suggest(r)._repr_html_()\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
