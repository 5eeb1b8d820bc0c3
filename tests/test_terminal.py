"""The small plot of a terminal."""

import numpy as np
import pytest

from normtune.records import NormRecord
from normtune.terminal import BRAILLE, LINE, ROWS, plot_lines

NORMS = np.random.default_rng(0).lognormal(size=150)


def dots(lines):
    return sum((ord(c) - BRAILLE).bit_count() for line in lines for c in line if ord(c) >= BRAILLE)


def plotted(norms, max_norm=2.0, width=100):
    return plot_lines(NormRecord.of(norms), max_norm, width=width)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_wider_than_the_terminal(width):
    """Seven lines that fit."""
    lines = plotted(NORMS, width=width)
    assert len(lines) == ROWS
    assert max(map(len, lines)) <= width


def test_few_norms_are_a_dot_each():
    """Nothing is lost or invented while there is a column of dots for each."""
    assert dots(plotted(NORMS)) == len(NORMS)


def test_the_suggestion_is_a_line_at_its_value():
    """Norms above it stand above the line, norms below it below."""
    lines = plotted(np.r_[np.full(40, 0.01), np.full(40, 100.0)], max_norm=1.0)
    (at,) = [i for i, line in enumerate(lines) if LINE in line]
    assert at == ROWS // 2
    assert lines[at].split()[0] == "1"
    assert lines[at].endswith("<- suggested")
    assert dots(lines[:at]) == dots(lines[at + 1 :]) == 40
    assert dots([lines[at]]) == 0


def test_the_largest_and_the_smallest_norm_are_named():
    """Numbers stand at the left."""
    lines = plotted(np.geomspace(0.5, 80.0, 100))
    assert lines[0].split()[0] == "80"
    assert lines[-1].split()[0] == "0.5"


def test_a_spike_among_a_million_steps_is_seen():
    """Each column keeps its largest norm."""
    norms = np.full(1_000_000, 1.0)
    norms[::3] = 1.5
    norms[500_000] = 1e4
    lines = plotted(norms)
    assert dots([lines[0]]) == 1


@pytest.mark.parametrize("norms", [[], [0.0, 0.0], [np.nan] * 5])
def test_nothing_to_draw_gives_no_lines(norms):
    """No norm above 0, no plot."""
    assert plotted(np.array(norms, dtype=float)) == []


def test_a_narrow_terminal_gets_no_lines():
    """Below 80 columns the text is enough."""
    assert plotted(NORMS, width=79) == []


@pytest.mark.parametrize("value", [1e-30, 1.0, 1e30])
def test_one_value_and_any_size_can_be_drawn(value):
    """A constant series is one row of dots."""
    assert dots(plotted(np.full(50, value), max_norm=value)) == 50
