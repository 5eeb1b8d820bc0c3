"""Plots: what is drawn, on whose axes, and with how many points."""

import dataclasses
import math

import numpy as np
import pytest

from normtune import plots, statistics
from normtune.plots.style import BLUE, ORANGE, log_axis, shown
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


@pytest.fixture
def ax():
    return plt.subplots()[1]


def marks(ax):
    """The points drawn one by one, as (steps, norms) by their label; crosses at the edge too."""
    lines = [line for line in ax.lines if line.get_linestyle() == "None"]
    return {line.get_label(): np.array(line.get_xydata()) for line in lines}


def points(ax):
    """All points within the axes, steps and norms."""
    inside = [
        np.array(line.get_xydata())
        for line in ax.lines
        if line.get_linestyle() == "None" and line.get_transform() == ax.transData
    ]
    return np.concatenate(inside)


def lines_at(ax):
    """Heights of the horizontal lines of `ax`."""
    return [float(line.get_ydata()[0]) for line in ax.lines if len(line.get_ydata()) == 2]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def texts_of(ax):
    return [text.get_text() for text in ax.texts]


def test_a_new_figure_has_both_axes():
    """Without axes: norms over steps and their distribution, both with the suggestion."""
    s = suggest(NORMS)
    left, right = s.plot()
    assert left.figure is right.figure
    assert s.max_norm in lines_at(left)
    assert s.max_norm in lines_at(right)
    assert left.get_yscale() == right.get_yscale() == "log"


def test_given_axes_are_used_and_returned(ax):
    """With axes, only those are drawn on."""
    assert suggest(NORMS).plot(ax) is ax
    assert len(plt.get_fignums()) == 1
    assert sorted(points(ax)[:, 1]) == pytest.approx(sorted(NORMS))
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel() == "gradient norm before clipping"


def test_clipped_steps_are_marked(ax):
    """Triangles of a second colour are those that the suggestion would clip."""
    s = suggest(NORMS)
    s.plot(ax)
    marked = marks(ax)["would be clipped"]
    clipped = statistics.coefficients(NORMS, s.max_norm) < 1
    assert sorted(marked[:, 1]) == pytest.approx(sorted(NORMS[clipped]))
    colors = {line.get_marker(): line.get_color() for line in ax.lines}
    assert (colors["."], colors["^"]) == (BLUE, ORANGE)


def test_the_value_in_use_is_a_dashed_line(ax):
    """Current and suggested are named with their numbers."""
    suggest(NORMS, current=0.7).plot(ax)
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert line.get_ydata()[0] == 0.7
    assert "current max_norm 0.7" in legend_of(ax)


def test_nonfinite_and_skipped_steps_are_marked_at_the_top(ax):
    """Steps without a norm to draw are crosses and ticks, counted in the legend."""
    norms = NORMS.copy()
    norms[[10, 20, 30]] = math.nan
    record = NormRecord.of(norms)
    record.skipped[30] = True
    suggest(record).plot(ax)
    found = marks(ax)
    assert list(found["not finite (2)"][:, 0]) == [11, 21]
    assert list(found["skipped by the GradScaler (1)"][:, 0]) == [31]


def test_earlier_starts_of_the_run_are_drawn_behind(ax):
    """They are grey crosses, counted in the legend, and drawn before the run itself."""
    earlier = [NormRecord.of(NORMS[:50] * 3), NormRecord.of(NORMS[:40] * 5)]
    plots.plot_norms(suggest(NORMS), ax, earlier=earlier)
    found = marks(ax)
    np.testing.assert_allclose(found["2 earlier starts of the run"][:, 1], NORMS[:50] * 3)
    assert legend_of(ax)[0] == "2 earlier starts of the run"


def test_many_steps_are_bands_with_few_points(ax):
    """200,000 steps become bands from least to largest, and the largest norm stays a point."""
    norms = np.random.default_rng(1).lognormal(size=200_000)
    suggest(norms).plot(ax)
    shown_points = points(ax)
    assert len(shown_points) <= plots.MOST_POINTS
    assert shown_points[:, 1].max() == pytest.approx(norms.max())
    outer, inner = (c.get_paths()[0].vertices[:, 1] for c in ax.collections)
    assert (outer.min(), outer.max()) == pytest.approx((norms.min(), norms.max()))
    assert inner.max() < norms.max()
    drawn = sum(len(c.get_paths()[0].vertices) for c in ax.collections)
    assert drawn + sum(len(line.get_xdata()) for line in ax.lines) < 5000
    assert {"least to largest", "p10 to p90", "median"} <= set(legend_of(ax))


@pytest.mark.parametrize("n", [10, 2000, 2001, 9999])
def test_thinning_keeps_order_and_extremes(n):
    """Steps stay in order, each keeps its norm, and both extremes stay."""
    norms = np.random.default_rng(n).lognormal(size=n)
    steps, thinned = plots.thin(np.arange(n), norms)
    assert len(steps) <= plots.MOST_POINTS
    assert np.all(np.diff(steps) > 0)
    np.testing.assert_array_equal(norms[steps], thinned)
    assert (thinned.min(), thinned.max()) == (norms.min(), norms.max())


def test_the_distribution_counts_every_norm(ax):
    """The bars hold all norms; percentiles, 1 and 10 are drawn or told."""
    s = suggest(NORMS)
    plots.plot_distribution(s, ax)
    outline = ax.patches[0].get_path().vertices
    counts = np.histogram(NORMS, np.logspace(*np.log10([NORMS.min(), NORMS.max()]), 50))[0]
    assert outline[:, 0].max() == pytest.approx(counts.max(), rel=0.3)
    at = dict(zip([c.name for c in s.candidates], [c.max_norm for c in s.candidates], strict=True))
    assert {at["p10"], at["p50"], at["p99"], 1.0} <= set(lines_at(ax))
    assert {"p10", "p90", "1.0"} <= set(texts_of(ax))


def test_a_default_far_from_the_norms_is_told(ax):
    """Where 10 lies far above all norms the picture says so instead of being squeezed."""
    plots.plot_distribution(suggest(0.001 * NORMS), ax)
    assert "1.0, 10.0 lie far above all norms" in texts_of(ax)
    assert ax.get_ylim()[1] < 0.1


def test_the_effect_curves_are_those_of_torch(ax):
    """At each max_norm: share of coefficients below 1, and their mean."""
    s = suggest(NORMS)
    plots.plot_effect(s, ax)
    curves = {line.get_label(): line for line in ax.lines}
    for label, field in (("gradient kept (mean)", "kept"), ("steps clipped", "share")):
        x, y = curves[label].get_data()
        for i in (10, 70, 150):
            expected = getattr(statistics.clip_effect(NORMS, float(x[i])), field)
            assert y[i] == pytest.approx(expected, abs=2e-3)
    assert ax.get_xscale() == "log"
    assert ax.get_ylim() == pytest.approx((-0.02, 1.04))


def test_under_sgd_the_effect_is_named_a_learning_rate(ax):
    """Clipping lowers the learning rate for the big gradients; under Adam it does not."""
    plots.plot_effect(suggest(NORMS, optimizer="SGD"), ax)
    assert "learning-rate" in ax.get_ylabel()
    plots.plot_effect(suggest(NORMS, optimizer="AdamW"), ax)
    assert ax.get_ylabel() == "share"


def with_groups(groups, **metadata):
    n = len(next(iter(groups.values())))
    record = NormRecord.of(np.ones(n), metadata=metadata)
    return dataclasses.replace(record, groups=groups)


def test_group_shares_are_of_the_squared_norm():
    """Norms 3 and 4 are 36 % and 64 % of the squared norm 25; what is unknown stays unknown."""
    record = with_groups({"a": np.array([3.0, np.nan]), "b": np.array([4.0, np.nan])})
    shares = plots.group_shares(record)
    assert (shares["a"][0], shares["b"][0]) == pytest.approx((0.36, 0.64))
    assert np.isnan(shares["a"][1])


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_group_shares_neither_overflow_nor_vanish(scale):
    """The same shares at any size of the norms."""
    record = with_groups({"a": scale * np.array([3.0]), "b": scale * np.array([4.0])})
    assert plots.group_shares(record)["a"][0] == pytest.approx(0.36)


def test_the_heat_map_has_the_largest_groups_on_top(ax):
    """Rows are sorted by mean share, the rest is one row, and columns are spans of steps."""
    groups = {f"layer.{i}": np.full(1000, float(i + 1)) for i in range(30)}
    plots.plot_groups(with_groups(groups), ax)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[0] == "layer.29"
    assert labels[-1] == "all others (11)"
    picture = ax.images[0].get_array()
    assert picture.shape == (20, 120)
    np.testing.assert_allclose(picture.sum(axis=0), 1.0)


def test_a_record_without_groups_is_refused(ax):
    """The error says how to record them."""
    with pytest.raises(ValueError, match="groups="):
        plots.plot_groups(NormRecord.of(NORMS), ax)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_norms_of_any_size_and_zeros_can_be_drawn(scale):
    """Tiny, huge and zero norms draw without a warning."""
    norms = scale * NORMS
    norms[0] = 0.0
    s = suggest(NormRecord.of(norms, max_norm=scale))
    left, _ = s.plot()
    left.figure.canvas.draw()
    plots.plot_effect(s, plt.subplots()[1]).figure.canvas.draw()


def test_nearly_constant_norms_can_be_drawn():
    """A range of one percent gives axes without a warning."""
    s = suggest([1.0 + 1e-3 * (i % 13) for i in range(60)])
    for draw in (plots.plot_norms, plots.plot_distribution, plots.plot_effect):
        draw(s, plt.subplots()[1]).figure.canvas.draw()


def test_names_cannot_break_the_picture():
    """A rule whose name holds control characters or mathtext is drawn as plain text."""

    def rule(norms):
        return float(np.median(norms))

    rule.__name__ = "my$\x1b_rule$"
    left, _ = suggest(NORMS, rule=rule).plot()
    left.figure.canvas.draw()
    assert any(r"my\$_rule\$" in label for label in legend_of(left))


def test_a_long_name_keeps_its_ends():
    """Both ends of a parameter's name tell it apart."""
    name = "transformer.h.0.attention.projection.weight"
    assert shown(name, 20) == "transfor...on.weight"


@pytest.mark.parametrize(("low", "high", "minor"), [(1.0, 5.0, True), (0.01, 100.0, False)])
def test_a_log_axis_has_plain_numbers(low, high, minor, ax):
    """No powers of ten; within a decade the ticks between are named."""
    ax.set_ylim(low, high)
    log_axis(ax, "y")
    ax.figure.canvas.draw()
    assert "1" in [t.get_text() for t in ax.get_yticklabels()]
    assert any(t.get_text() for t in ax.get_yticklabels(minor=True)) is minor
