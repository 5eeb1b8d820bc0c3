"""The forms of a report: one HTML page that needs nothing else, Markdown, text and JSON."""

from __future__ import annotations

import html
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from normtune.errors import NormtuneError
from normtune.format import clean

if TYPE_CHECKING:
    from normtune.contents import Content, Picture, Section, Table

WIDTH = 100  # columns of the text form


def as_html(content: Content) -> str:
    """One self-contained page: pictures inline, no script, nothing loaded from anywhere.

    Raises:
        NormtuneError: If jinja2 or matplotlib is not installed.
    """
    from normtune import pictures

    pictures.require_matplotlib("a report in HTML")
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        message = "a report in HTML needs jinja2; install it with: pip install 'normtune[plot]'"
        raise NormtuneError(message) from None
    from markupsafe import Markup

    # Not select_autoescape: it does not know the suffix of this template, and would not escape.
    house = Environment(
        autoescape=True,
        loader=PackageLoader("normtune"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(value),
    )
    drawn = {
        (i, picture.name): Markup(_svg(picture, i))  # noqa: S704  matplotlib escapes text in it
        for i, section in enumerate(content.sections)
        for picture in section.pictures
    }
    return house.get_template("report.html.j2").render(content=content, drawn=drawn) + "\n"


def _svg(picture: Picture, section: int) -> str:
    from normtune import pictures

    size = pictures.LARGE if picture.large else pictures.SIZE
    name = f"{picture.name}-{section}"
    return pictures.svg(picture.draw, name=name, alt=clean(picture.alt), size=size)


def as_json(content: Content) -> str:
    """The values behind the report as strict JSON."""
    plain = {"title": content.title, "answer": content.answer, **content.data}
    return json.dumps(plain, indent=2, allow_nan=False, default=str) + "\n"


# --- Markdown ----------------------------------------------------------------------------------


def as_markdown(content: Content) -> str:
    """The report without its pictures, for an issue or a pull request."""
    head = [f"# {_md(content.title)}", f"**{_md(content.answer)}**", *map(_md, content.lead)]
    parts = [part for section in content.sections for part in _md_section(section)]
    return "\n\n".join([*head, *parts]) + "\n"


def _md_section(section: Section) -> Iterator[str]:
    if not _worth_words(section):
        return
    yield f"## {_md(section.heading)}"
    yield from map(_md, (*section.paragraphs, *section.aside))
    if section.table:
        yield _md_table(section.table)
    if section.points:
        yield "\n".join(f"- {_md(point)}" for point in section.points)
    if section.closing:
        yield _md(section.closing)
    if section.code:
        lines = "\n".join(map(clean, section.code))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
        yield f"{fence}\n{lines}\n{fence}"


def _md_table(table: Table) -> str:
    head = table.head or ("", "") if table.rows else ()
    rows = [head, ["---"] * len(head), *table.rows]
    lines = ["| " + " | ".join(map(_md, row)) + " |" for row in rows]
    lines[1] = "|" + " --- |" * len(head)
    return "\n".join(lines)


def _md(text: object) -> str:
    """Text that Markdown shows as it is; tags are no tags there."""
    escaped = re.sub(r"([\\`*_{}\[\]|~$#!])", r"\\\1", clean(text))
    return html.escape(escaped, quote=False)


# --- text --------------------------------------------------------------------------------------


def as_text(content: Content, *, width: int = WIDTH) -> str:
    """The report without its pictures, for a terminal or a mail."""
    title = clean(content.title)
    lines = [title, "=" * len(title), "", clean(content.answer)]
    lines += [line for text in content.lead for line in _wrapped(text, width)]
    for section in content.sections:
        if _worth_words(section):
            heading = clean(section.heading)
            lines += ["", heading, "-" * len(heading), *_text_section(section, width)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _text_section(section: Section, width: int) -> Iterator[str]:
    for paragraph in (*section.paragraphs, *section.aside):
        yield from _wrapped(paragraph, width)
    if section.table:
        yield from _text_table(section.table)
    for point in section.points:
        yield from _wrapped(point, width, start="- ", then="  ")
    if section.closing:
        yield from _wrapped(section.closing, width)
    yield from (f"  {clean(line)}" for line in section.code)


def _text_table(table: Table) -> Iterator[str]:
    rows = [tuple(map(clean, row)) for row in (table.head, *table.rows) if row]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))


def _wrapped(text: str, width: int, *, start: str = "", then: str = "") -> list[str]:
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(clean(text), width, initial_indent=start, subsequent_indent=then, **how)


def _worth_words(section: Section) -> bool:
    """Whether anything is left of a section without its pictures."""
    said = (section.paragraphs, section.aside, section.table, section.points, section.code)
    return any(said) or bool(section.closing)


FORMS: dict[str, Callable[[Content], str]] = {
    "html": as_html,
    "markdown": as_markdown,
    "text": as_text,
    "json": as_json,
}
SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".txt": "text", ".json": "json"}
