"""Plain values to text: numbers, shares, and a suggestion as the lines that `suggest` prints."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from normtune.suggestion import Candidate, Suggestion

HEADINGS = ("candidate", "max_norm", "steps clipped", "1st / 2nd half", "gradient kept")
MARK = "<- suggested"
WINDOW = "this window only"


def number(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits and without an exponent where that reads well.

    >>> [number(x) for x in (0.8237, 10.0, 12345.6, 0.00012, 3.2e-7, 8.99e15, float("inf"))]
    ['0.824', '10', '12300', '0.00012', '3.2e-7', '8.99e15', 'inf']
    """
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    short = float(f"{value:.{digits}g}")
    if 1e-4 <= abs(short) < 1e6:
        return f"{short:.10f}".rstrip("0").rstrip(".")
    mantissa, _, exponent = f"{short:.{digits - 1}e}".partition("e")
    plain = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{plain}e{int(exponent)}"


def share(value: float) -> str:
    """A share from 0 to 1 in percent; 0 % and 100 % only where they are exact.

    >>> [share(x) for x in (0.0, 0.001, 0.104, 0.9999, 1.0)]
    ['0 %', '<1 %', '10 %', '>99 %', '100 %']
    """
    if 0 < value < 0.01 and round(100 * value) < 1:
        return "<1 %"
    if 0.99 < value < 1 and round(100 * value) > 99:
        return ">99 %"
    return f"{100 * value:.0f} %"


def count(n: int, noun: str) -> str:
    """A number with its noun, in the plural where there are several.

    >>> count(1, "step"), count(3, "step")
    ('1 step', '3 steps')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time to wait, roughly.

    >>> duration(12.3), duration(300), duration(9000)
    ('12 s', '5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def clean(text: object) -> str:
    r"""`text` on one line, without the control characters that could steer a terminal.

    >>> clean("layer\x1b[31m.weight\nnext")
    'layer[31m.weight next'
    """
    spaced = "".join(" " if c in "\n\r\t" else c for c in str(text))
    return "".join(c for c in spaced if c.isprintable())


def headline(suggestion: Suggestion) -> str:
    """What the suggested max_norm stands on, as one line."""
    s = suggestion
    skipped = f", first {s.skipped_first} left out" if s.skipped_first else ""
    kind = "unclipped norms" if s.record.origin.clip_side == "before" else "norms"
    norms = f"{s.n_steps - s.n_nonfinite} {kind}"
    return f"{clean(s.label)} of {norms} at {rate(s)}{skipped}{_interval(s)}"


def shares_line(suggestion: Suggestion) -> str:
    """Which parameters carry the largest norms."""
    top = ", ".join(f"{share(s.top)} from {clean(s.name)}" for s in suggestion.shares)
    first = suggestion.shares[0]
    usual = f"{clean(first.name)} over all steps: {share(first.all)}"
    return f"squared norm of the top 1 % of steps: {top} ({usual})"


def paste_lines(suggestion: Suggestion) -> tuple[str, ...]:
    """Code that sets the suggested max_norm in a loop, in Lightning and in the HF Trainer."""
    value = repr(suggestion.max_norm)
    if suggestion.norm_type != 2:
        kind = repr(suggestion.norm_type).replace("inf", 'float("inf")')
        arguments = f"model.parameters(), max_norm={value}, norm_type={kind}"
        return (f"torch.nn.utils.clip_grad_norm_({arguments})",)
    return (
        f"torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm={value})",
        f"Trainer(gradient_clip_val={value})   TrainingArguments(max_grad_norm={value})",
    )


def table_rows(suggestion: Suggestion) -> list[tuple[str, ...]]:
    """The cells of the table, one tuple a candidate: name, four figures, and a note."""
    texts = aligned([c.max_norm for c in suggestion.candidates])
    return [
        (clean(c.name), text, share(c.clipped), halves(c), f"{c.kept:.2f}", _note(c))
        for c, text in zip(suggestion.candidates, texts, strict=True)
    ]


def halves(candidate: Candidate) -> str:
    """The shares of clipped steps in the first and in the second half."""
    return f"{share(candidate.first_half)} / {share(candidate.second_half):>4}"


def aligned(values: Sequence[float]) -> list[str]:
    """Numbers with the same count of decimals, where their sizes allow it.

    >>> aligned([0.21, 2.31, 10.0])
    ['0.21', '2.31', '10.00']
    >>> aligned([0.00002, 10.0])
    ['2e-5', '10']
    """
    texts = [number(value, 8) for value in values]
    decimals = max((len(t.partition(".")[2]) for t in texts), default=0)
    if any("e" in t for t in texts) or decimals > 4:
        return [number(value, 4) for value in values]
    return [f"{value:.{decimals}f}" for value in values]


def format_suggestion(suggestion: Suggestion, *, width: int = 100) -> str:
    """The suggestion as text without colours.

    Args:
        suggestion: What `suggest` gave.
        width: The number of columns to keep to; the table itself is never broken.
    """
    s = suggestion
    start = f"suggested max_norm   {number(s.max_norm, 8):<10}"
    lines = _hang(start, headline(s), width)
    for note in s.notes:
        lines += _hang("source   ", clean(note), width)
    lines += _table(s)
    if s.shares:
        lines += _hang("largest steps   ", shares_line(s), width)
    lines.append("doubts")
    for doubt in s.doubts[:-1]:
        lines += _hang("  - ", clean(doubt), width)
    lines += _hang("  ", clean(s.doubts[-1]), width)
    first, *others = paste_lines(s)
    return "\n".join([*lines, f"paste   {first}", *(f"        {line}" for line in others)])


def rate(s: Suggestion) -> str:
    """The learning rate of the window, and the optimizer."""
    optimizer = f" ({clean(s.optimizer)})" if s.optimizer else ""
    if not math.isfinite(s.lr):
        return f"unknown lr{optimizer}"
    if s.lr_last < 0.9 * s.lr:
        return f"lr {number(s.lr)} falling to {number(s.lr_last)}{optimizer}"
    return f"lr {number(s.lr)}{optimizer}"


def _interval(s: Suggestion) -> str:
    low, high = s.interval
    if math.isnan(low):
        return f" ({WINDOW})"
    start = f"; {clean(s.label)} of such steps"
    if math.isfinite(high):
        return f"{start} lies in {number(low)} to {number(high)} ({WINDOW})"
    if low > 0:
        return f"{start} lies above {number(low)}, no upper bound ({WINDOW})"
    return f"{start} has no bounds yet ({WINDOW})"


def _note(candidate: Candidate) -> str:
    mark = MARK if candidate.suggested else ""
    return "; ".join(part for part in (mark, candidate.note) if part)


def _table(s: Suggestion) -> list[str]:
    rows = table_rows(s)
    widths = [max(len(h), *(len(r[i]) for r in rows)) for i, h in enumerate(HEADINGS)]
    widths[0] = max(widths[0], 11)
    lines = [_cells(HEADINGS, widths, "")]
    for row in rows:
        note = row[5] if row[5].startswith(MARK) else f"   {row[5]}"
        lines.append(_cells(row[:5], widths, f"   {note}" if row[5] else ""))
    return lines


def _cells(cells: Sequence[str], widths: Sequence[int], note: str) -> str:
    first = cells[0].ljust(widths[0])
    rest = "   ".join(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))
    return f"  {first}   {rest}{note}".rstrip()


def _hang(start: str, text: str, width: int) -> list[str]:
    indent = " " * len(start) if len(start) <= width // 2 else " " * 4
    return textwrap.wrap(
        text,
        width=max(width, 40),
        initial_indent=start,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [start]
