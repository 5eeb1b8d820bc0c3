"""Pictures as SVG inside a page: their colours follow the page, and nothing is loaded."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.errors import NormtuneError
from normtune.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], object]

SIZE = (4.9, 3.8)  # inches; small enough to be read on a telephone
LARGE = (5.7, 4.4)
# The page gives each of them a value for light and for dark.
VARIABLES = {
    style.BLUE: "--blue",
    style.ORANGE: "--orange",
    style.GREEN: "--green",
    style.PURPLE: "--purple",
    style.SKY: "--sky",
    style.RED: "--red",
    style.GREY: "--grey",
    style.INK: "--ink",
    style.PAPER: "--paper",
}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_FONT = re.compile(r"font: ((?:\w+ )*[\d.]+px) .*?sans-serif(?=[;\"])")
_TAG = re.compile(r"<[^>]*>")
_DROPPED = re.compile(
    r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->|<defs>\s*</defs>", re.DOTALL
)


def svg(draw: Draw, *, name: str, alt: str, size: tuple[float, float] = SIZE) -> str:
    """Draw on new axes and give the picture as one ``<svg>`` element.

    Args:
        draw: Draws on the axes that it is given.
        name: Comes before every id, so that several pictures fit into one page.
        alt: What the picture shows, for those who cannot see it.
        size: Width and height in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = dict.fromkeys(_INKED, style.INK)
    settings |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    stream = io.StringIO()
    with rc_context(settings), _any_script():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _inline(stream.getvalue(), name, alt)


def save(draw_figure: Callable[[], Figure | None], file: Path) -> None:
    """Draw a figure to a picture file.

    Raises:
        NormtuneError: If matplotlib is missing or the file cannot be written.
    """
    check(file)
    import matplotlib as mpl

    mpl.use("agg")
    try:
        with _any_script():
            figure = draw_figure()
            if figure is not None:
                figure.savefig(file)
    except (OSError, ValueError) as error:
        message = f"cannot draw to {file}: {error}"
        raise NormtuneError(message) from None


def check(file: Path) -> None:
    """Refuse a picture file that cannot be drawn to, before long work begins.

    Raises:
        NormtuneError: If matplotlib is missing, the folder is missing, or the suffix is unknown.
    """
    require_matplotlib("--plot")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in known:
        message = f"cannot draw to {file}: give a file that ends in .png, .svg or .pdf"
        raise NormtuneError(message)
    if not file.parent.is_dir():
        message = f"cannot draw to {file}: no such folder: {file.parent}"
        raise NormtuneError(message)


def require_matplotlib(what: str) -> None:
    """Refuse `what` where matplotlib is not installed.

    Raises:
        NormtuneError: With the command that installs it.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        message = f"{what} needs matplotlib; install it with: pip install 'normtune[plot]'"
        raise NormtuneError(message) from None


@contextmanager
def _any_script() -> Iterator[None]:
    """Names of any script may be drawn; what the font lacks is no matter for a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        yield


def _inline(text: str, name: str, alt: str) -> str:
    body = _DROPPED.sub("", text[text.index("<svg") :])
    body = _TAG.sub(lambda tag: _tag(tag[0], name), body)
    label = html.escape(alt)
    opening = f'<svg role="img" aria-label="{label}"'
    body = re.sub(r'^<svg ((?:(?!viewBox)[^>])*)(viewBox="[^"]*")[^>]*>', rf"{_KEPT}\2>", body)
    return re.sub(r"\n\s*", "\n", body.replace(_KEPT, f"{opening} ", 1)).strip()


_KEPT = "<svg-opening "


def _tag(tag: str, name: str) -> str:
    """One tag with ids of its own, the page's colours and font, and no needless digits."""
    if tag.startswith("<image"):  # its bytes are no text
        return re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = _FONT.sub(r"font: \1 var(--font)", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    return re.sub(r"#[0-9a-f]{6}", lambda c: _variable(c[0]), tag)


def _variable(color: str) -> str:
    name = VARIABLES.get(color)
    return f"var({name})" if name else color
