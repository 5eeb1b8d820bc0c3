"""Numbers as logs write them: quoted, abbreviated, grouped by thousands, not finite."""

from __future__ import annotations

import math
import re

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_WRAPPED = re.compile(
    r"(?:(?:np|numpy|torch|jnp)\.)?(?:float\d*|tensor|array|Array)\(\s*([^\s,()]+)"
)
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_BLANK = frozenset({"", "none", "null", "n/a", "na", "-", "--"})
LONGEST = 100  # characters; no number that a log prints is longer

# What stands in a text line where a number belongs; `number` turns it into one.
TEXT = (
    rb"""['"]?(?:(?:np\.)?(?:float\d*|tensor|array)\()?"""
    rb"([-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?[KMBGT]?(?![\w/])"
    rb"|[-+]?(?:nan|inf(?:inity)?|NaN|Inf(?:inity)?|NAN|INF)(?!\w))"
)


def number(value: object) -> float | None:
    """The number that `value` stands for, or None where it stands for none.

    >>> number("1.23K"), number("np.float64(0.4)"), number("1,234"), number("'0.5'")
    (1230.0, 0.4, 1234.0, 0.5)
    >>> number("loss"), number(None), number(True)
    (None, None, None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return _widened(value)
    if isinstance(value, str):
        return _from_text(value.strip().strip("'\""))
    if isinstance(value, list) and len(value) == 1:
        return number(value[0])
    return None


def is_blank(value: object) -> bool:
    """Whether a cell says that there is no value."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _BLANK)


def whole(value: object) -> int | None:
    """The step number that `value` stands for: ``12``, ``"5/100"``, ``"2K"``, ``10.0``.

    >>> whole("5/100"), whole("2K"), whole(10.0), whole("x"), whole(float("nan"))
    (5, 2000, 10, None, None)
    """
    if type(value) is int:
        return value if -(1 << 62) < value < 1 << 62 else None
    if isinstance(value, str) and "/" in value:
        value = value.partition("/")[0]
    found = number(value)
    if found is None or not math.isfinite(found) or abs(found) > 1 << 62:
        return None
    return int(found)


def _widened(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _from_text(text: str) -> float | None:
    if not text or len(text) > LONGEST or "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    if text[-1] in _SUFFIXES:
        found = _from_text(text[:-1])
        return None if found is None else found * _SUFFIXES[text[-1]]
    if _GROUPED.fullmatch(text):
        return float(text.replace(",", ""))
    wrapped = _WRAPPED.match(text)
    return _from_text(wrapped[1]) if wrapped else None
