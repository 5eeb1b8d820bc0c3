"""Small pieces of HTML for notebooks; whatever comes in is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import isfinite, log

import numpy as np
import numpy.typing as npt

from normtune.format import clean

WIDTH, HEIGHT, SPANS = 480, 70, 160


def text(value: object) -> str:
    r"""`value` as text of a page, on one line.

    >>> text("<b>\x1b[1m")
    '&lt;b&gt;[1m'
    """
    return html.escape(clean(value))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; without `head` the first cell of each row is its heading.

    >>> table((), [("a", 1)])
    '<table><tbody><tr><th>a</th><td>1</td></tr></tbody></table>'
    """
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{_cells(row, named=not head)}</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _cells(row: Sequence[object], *, named: bool) -> str:
    kinds = ["th" if named and not i else "td" for i in range(len(row))]
    cells = zip(kinds, row, strict=True)
    return "".join(f"<{kind}>{text(cell)}</{kind}>" for kind, cell in cells)


def points(sentences: Iterable[object]) -> str:
    """A list; nothing where there are no sentences."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def sparkline(values: npt.NDArray[np.float64], label: str) -> str:
    """Positive numbers in their order on a logarithmic scale, as a small SVG.

    Args:
        values: The numbers; what is not finite or not positive is left out.
        label: What is shown, in words.
    """
    good = values[np.isfinite(values) & (values > 0)]
    if not len(good):
        return ""
    spans = [good[a:b] for a, b in pairwise(_edges(len(good)))]
    low, high = log(float(good.min())), log(float(good.max()))
    scale = (HEIGHT - 4) / (high - low) if isfinite(low) and high > low else 0.0
    step = WIDTH / max(len(spans), 1)
    bars = "".join(
        f"M{step * (i + 0.5):.1f} {_height(span.max(), low, scale):.1f}"
        f"V{_height(span.min(), low, scale) + 0.8:.1f}"
        for i, span in enumerate(spans)
    )
    stroke = f'stroke="#3d8fc9" stroke-width="{max(step * 0.8, 1):.1f}" fill="none"'
    return (
        f'<svg role="img" aria-label="{text(label)}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:100%"><path d="{bars}" {stroke}/></svg>'
    )


def _edges(n: int) -> npt.NDArray[np.intp]:
    return np.linspace(0, n, min(n, SPANS) + 1).astype(np.intp)


def _height(value: float, low: float, scale: float) -> float:
    return HEIGHT - 2 - scale * (log(float(value)) - low)
