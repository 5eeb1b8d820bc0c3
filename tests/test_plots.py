"""Plots: what is drawn, on whose axes, and with how many points."""

import math

import numpy as np
import pytest

from normtune import plots
from normtune.records import NormRecord
from normtune.suggestion import suggest

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

NORMS = np.random.default_rng(0).lognormal(0.0, 0.5, 300)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def points(ax):
    """All points of the scatters of `ax`, steps and norms."""
    return np.concatenate([c.get_offsets() for c in ax.collections])


def lines_at(ax):
    """Heights of the horizontal lines of `ax`."""
    return [float(line.get_ydata()[0]) for line in ax.lines if len(line.get_ydata()) == 2]


def test_a_new_figure_has_both_axes():
    """Without axes: norms over steps and their distribution, both with the suggestion."""
    s = suggest(NORMS)
    left, right = s.plot()
    assert left.figure is right.figure
    assert s.max_norm in lines_at(left)
    assert s.max_norm in lines_at(right)
    assert left.get_yscale() == right.get_yscale() == "log"


def test_given_axes_are_used_and_returned():
    """With axes, only those are drawn on."""
    _, ax = plt.subplots()
    assert suggest(NORMS).plot(ax) is ax
    assert len(plt.get_fignums()) == 1
    assert sorted(points(ax)[:, 1]) == pytest.approx(sorted(NORMS))


def test_clipped_steps_are_marked():
    """The points of the second colour are those that the suggestion would clip."""
    s = suggest(NORMS)
    _, ax = plt.subplots()
    s.plot(ax)
    marked = ax.collections[1].get_offsets()[:, 1]
    assert sorted(marked) == pytest.approx(sorted(NORMS[s.max_norm / (NORMS + 1e-6) < 1]))


def test_nonfinite_steps_are_marked_at_the_top():
    """Steps without a finite norm are crosses, counted in the legend."""
    norms = NORMS.copy()
    norms[[10, 20]] = math.nan
    _, ax = plt.subplots()
    suggest(norms).plot(ax)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "not finite (2)" in labels
    crosses = next(line for line in ax.lines if line.get_marker() == "x")
    assert list(crosses.get_xdata()) == [11, 21]


def test_no_more_points_than_a_picture_can_show():
    """200,000 steps become at most 4000 points, and the largest norm is one of them."""
    norms = np.random.default_rng(1).lognormal(size=200_000)
    _, ax = plt.subplots()
    suggest(norms).plot(ax)
    shown = points(ax)
    assert len(shown) <= plots.MOST_POINTS
    assert shown[:, 1].max() == pytest.approx(norms.max())
    assert shown[:, 1].min() == pytest.approx(norms.min())


@pytest.mark.parametrize("n", [10, 4000, 4001, 9999])
def test_thinning_keeps_order_and_extremes(n):
    """Steps stay in order, each keeps its norm, and both extremes stay."""
    norms = np.random.default_rng(n).lognormal(size=n)
    steps, thinned = plots.thin(np.arange(n), norms)
    assert len(steps) <= plots.MOST_POINTS
    assert np.all(np.diff(steps) > 0)
    np.testing.assert_array_equal(norms[steps], thinned)
    assert (thinned.min(), thinned.max()) == (norms.min(), norms.max())


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_norms_of_any_size_and_zeros_can_be_drawn(scale):
    """Tiny, huge and zero norms draw without a warning."""
    norms = scale * NORMS
    norms[0] = 0.0
    left, _ = suggest(NormRecord.of(norms, max_norm=scale)).plot()
    left.figure.canvas.draw()


def test_names_cannot_break_the_picture():
    """A rule whose name holds control characters or mathtext is drawn as plain text."""

    def rule(norms):
        return float(np.median(norms))

    rule.__name__ = "my$\x1b_rule$"
    left, _ = suggest(NORMS, rule=rule).plot()
    left.figure.canvas.draw()
