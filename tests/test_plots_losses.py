"""The picture of a study: where its runs, arms and intervals stand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_results import result_of

from normtune import plots
from normtune.trials import Settings, Trial

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

SETTINGS = Settings(24, suggestion=0.5, low=0.01, high=5.0, current=2.0, lr=0.1)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def trials(sign=1.0):
    """Three arms on four fresh seeds after runs of the explore seed; one run diverged."""
    none, found = math.inf, []
    for max_norm, factor, value in (
        (none, 1.0, 2.0), (0.5, 1.0, 1.0), (0.02, 1.0, 8.0), (10.0, 1.0, 2.0), (none, 1 / 3, 1.5)
    ):  # fmt: skip
        stage, free = "explore" if factor == 1 else "lr", max_norm == 10.0
        found.append(Trial(max_norm, factor, 0, "finished", stage, sign * value, free))
    for seed in (1, 2, 3, 4):
        for max_norm, factor, value in ((none, 1.0, 2.0), (0.5, 1.0, 1.0), (none, 1 / 3, 1.5)):
            noise = 0.05 * (seed % 3) * (1 if factor == 1 else -1)
            state = "diverged" if (max_norm, factor, seed) == (none, 1.0, 4) else "finished"
            final = sign * value + noise if state == "finished" else None
            found.append(Trial(max_norm, factor, seed, state, "confirm", final))
    return found


@pytest.fixture
def result():
    return result_of(SETTINGS, trials())


def drawn(result):
    return plots.plot_losses(result, plt.subplots(layout="constrained")[1])


def by_label(ax):
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def xy(ax, marker):
    found = [line.get_xydata() for line in ax.lines if line.get_marker() == marker]
    return np.concatenate(found) if found else np.empty((0, 2))


def test_a_new_figure_is_made_where_no_axes_are_given(result):
    """`result.plot()` is enough in a notebook."""
    ax = result.plot()
    assert ax.get_xlabel() == "max_norm"
    assert ax.get_xscale() == "log"
    assert "lower is better" in ax.get_ylabel()


def test_each_arm_stands_at_its_max_norm_with_its_interval(result):
    """The bar is as long as the verdict's interval of the difference to no clipping."""
    bars = by_label(drawn(result))
    arm = next(a for a in result.verdict.arms if "suggestion" in a.label)
    container = bars[f"{arm.label} 0.5"]
    ((x, y),) = container.lines[0].get_xydata()
    assert (x, y) == pytest.approx((0.5, arm.mean))
    (segment,) = container.lines[2][0].get_segments()
    assert segment[1][1] - segment[0][1] == pytest.approx(arm.delta_high - arm.delta_low)


def test_every_finished_seed_is_a_dot(result):
    """Fresh seeds stand beside each other around their arm, each at its own value."""
    dots = xy(drawn(result), ".")
    fresh = [t.value for t in result.trials if t.stage == "confirm" and t.value is not None]
    assert sorted(dots[:, 1]) == pytest.approx(sorted(fresh))
    assert len(np.unique(dots[:, 0])) == len(dots)


def test_runs_without_clipping_have_columns_of_their_own(result):
    """One column a learning rate, right of every max_norm, named at the axis."""
    ax = drawn(result)
    ax.figure.canvas.draw()
    ticks = dict(zip([t.get_text() for t in ax.get_xticklabels()], ax.get_xticks(), strict=True))
    assert ticks["0.33x"] > ticks["1x"] > 10.0
    assert "no clipping" in [t.get_text() for t in ax.texts]
    low, high = ax.get_xlim()
    assert low < 0.02 < ticks["0.33x"] < high


def test_free_and_failed_runs_are_told_apart(result):
    """A copy is a hollow diamond, a diverged run a cross at the edge."""
    ax = drawn(result)
    labels = by_label(ax)
    free = labels["free (a copy)"]
    assert (free.get_marker(), free.get_fillstyle()) == ("d", "none")
    assert list(free.get_xdata()) == [10.0]
    failed = labels["diverged (1)"]
    assert failed.get_marker() == "x"
    assert failed.get_ydata()[0] == pytest.approx(0.97)


def test_a_run_far_away_does_not_squeeze_the_others(result):
    """It becomes an arrow at the edge, with its value in the legend."""
    ax = drawn(result)
    assert ax.get_ylim()[1] < 8.0
    assert by_label(ax)["beyond (1, to 8)"].get_marker() == "^"


def test_what_counts_as_equal_is_a_band(result):
    """The band lies around the mean of no clipping, as wide as the margin on both sides."""
    band = by_label(drawn(result))
    label = next(label for label in band if label.startswith("equal within"))
    none = next(a for a in result.verdict.arms if a.label.startswith("no clipping"))
    box = band[label].get_extents().transformed(band[label].axes.transData.inverted())
    margin = result.verdict.margin.loss
    assert (box.y0, box.y1) == pytest.approx((none.mean - margin, none.mean + margin))


def test_maximized_values_are_drawn_as_they_are():
    """The interval is turned with the direction, and failed runs stand at the lower edge."""
    settings = replace(SETTINGS, direction="maximize")
    result = result_of(settings, trials(sign=-1.0))
    ax = drawn(result)
    assert "higher is better" in ax.get_ylabel()
    assert by_label(ax)["diverged (1)"].get_ydata()[0] == pytest.approx(0.03)
    arm = next(a for a in result.verdict.arms if "suggestion" in a.label)
    (segment,) = by_label(ax)[f"{arm.label} 0.5"].lines[2][0].get_segments()
    assert segment[1][1] - arm.mean == pytest.approx(arm.delta - arm.delta_low)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_a_study_that_has_only_begun_can_be_drawn(n):
    """Nothing, one run, and a few."""
    ax = drawn(result_of(SETTINGS, trials()[:n]))
    ax.figure.canvas.draw()
    assert ax.get_title(loc="left") == "one seed an arm; no verdict yet"


def test_a_study_whose_runs_all_failed_can_be_drawn():
    """Only crosses are left."""
    failed = [replace(t, state="diverged", value=None) for t in trials()]
    assert "diverged (17)" in by_label(drawn(result_of(SETTINGS, failed)))
