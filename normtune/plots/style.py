"""What all pictures share: colours, harmless text, plain numbers on logarithmic axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normtune.format import clean, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Told apart by colour-blind eyes, and by their lightness on a grey print; markers and dashes
# differ as well. Each has 3:1 on white.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0b4f8a", "#c96f00", "#007a5a", "#8e3b76", "#3d8fc9"
RED, GREY, INK, PAPER = "#b3261e", "#757575", "#1d1d1f", "#ffffff"
LONGEST = 36  # characters of a name in a picture


def shown(text: object, longest: int = LONGEST) -> str:
    r"""A name as a picture may show it: on one line, short, and never taken for a formula.

    >>> shown("a$b$"), shown("layer.0.attention.weight", 12)
    ('a\\$b\\$', 'laye...eight')
    """
    plain = clean(text)
    if len(plain) > longest:
        keep = longest - 3
        plain = f"{plain[: keep // 2]}...{plain[len(plain) - (keep - keep // 2) :]}"
    return plain.replace("$", r"\$")


def log_axis(ax: Axes, which: str) -> None:
    """Make the ``"x"`` or ``"y"`` axis logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if which == "x":
        ax.set_xscale("log")
    else:
        ax.set_yscale("log")
    axis: Axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    plain = FuncFormatter(lambda value, _: number(value))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())
    if high / low < 30:  # within a decade and a half the ticks between are named too
        axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axis.set_minor_formatter(plain)


def counts(axis: Axis) -> None:
    """Few ticks, and short ones for large counts: 200k, 1M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(EngFormatter(sep=""))


def frame(ax: Axes, *, title: str, x: str, y: str) -> Axes:
    """Set the words around a picture, without the two sides of its frame that say nothing."""
    ax.set_title(title, fontsize="medium", loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def legend(ax: Axes) -> None:
    """Name what is drawn: below the picture where the figure makes room for it, else within."""
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    figure = ax.get_figure(root=True)
    if figure is not None and figure.get_layout_engine() is not None:
        columns = 1 if max(map(len, labels)) > 44 else 2
        ax.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            borderaxespad=4.6,  # below the label of the axis, however high the picture is
            ncols=columns,
            fontsize="small",
            frameon=False,
        )
    else:
        ax.legend(loc="best", fontsize="small", framealpha=0.85, edgecolor=GREY)
