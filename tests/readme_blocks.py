"""What the README and the docs show of normtune itself; `make readme` writes it.

Two kinds: commands whose output stands below them, and parts between ``<!-- generated: NAME -->``
and ``<!-- end -->``, made from the command line, the study file's model and the planner.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(
    r"^```console\n\$ normtune ([^\n]+)\n((?!```|\$ ).*?)^```", re.MULTILINE | re.DOTALL
)
MADE = re.compile(r"^<!-- generated: ([a-z ]+) -->\n(.*?)^<!-- end -->", re.MULTILINE | re.DOTALL)


def output_of(command):
    """What the command prints, at the width that the README uses for it."""
    width = "80" if "--help" in command else "100"
    done = subprocess.run(
        [sys.executable, "-m", "normtune", *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": width, "NO_COLOR": "1"},
        check=True,
    )
    return done.stdout.rstrip() + "\n"


def refreshed(text):
    """The text with every shown output and every generated part as it is now."""
    text = BLOCK.sub(lambda m: f"```console\n$ normtune {m[1]}\n{output_of(m[1])}```", text)
    return MADE.sub(lambda m: f"<!-- generated: {m[1]} -->\n{made(m[1])}<!-- end -->", text)


def made(name):
    """A generated part."""
    parts = {
        "commands": commands,
        "study keys": study_keys,
        "search keys": search_keys,
        "budgets": budgets,
    }
    return parts[name]()


# --- the command line


def command_names():
    """The commands that there are."""
    import typer.main

    from normtune.cli import app

    return tuple(typer.main.get_command(app).commands)


def commands():
    """The help of every command."""
    parts = (
        f"## normtune {name}\n\n```text\n{output_of(name + ' --help')}```\n"
        for name in command_names()
    )
    return "\n".join(["", *parts, ""])


# --- the study file


def study_keys():
    """The keys of a study file as a table."""
    from normtune.study import StudyConfig

    return _keys(StudyConfig)


def search_keys():
    """The keys under ``search:`` as a table."""
    from normtune.study import SearchConfig

    return _keys(SearchConfig)


def _keys(model):
    told = _told(model.__doc__)
    rows = [
        f"| `{name}` | {_kind(schema)} | {_default(schema)} | {told[name]} |"
        for name, schema in model.model_json_schema()["properties"].items()
    ]
    return "\n".join(["", "| key | value | without it | |", "|---|---|---|---|", *rows, "", ""])


def _told(doc):
    """What a Google docstring says of each attribute."""
    listed = doc.partition("Attributes:\n")[2]
    entries = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", listed, re.MULTILINE | re.DOTALL)
    plain = {name: " ".join(text.split()) for name, text in entries}
    return {name: text.replace("|", "\\|").replace("``", "`") for name, text in plain.items()}


KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "array": "list of texts",
    "object": "keys",
}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def _kind(schema):
    """What may stand there, in words, from the JSON schema of a key."""
    options = [o for o in schema.get("anyOf", [schema]) if o.get("type") != "null"]
    return " or ".join(map(_option, options))


def _option(schema):
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    limits = [f"{words} {schema[key]:g}" for key, words in BOUNDS.items() if key in schema]
    return ", ".join([KINDS[schema.get("type", "object")], *limits])


def _default(schema):
    value = schema.get("default")
    if value is None or isinstance(value, dict):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# --- the planner


def budgets():
    """What each budget is split into, and which sentences it reaches."""
    from normtune.plan import split
    from normtune.trials import Settings

    rows = []
    for runs in (8, 12, 16, 24, 30, 40):
        parts = split(Settings(max_runs=runs, suggestion=1.0, low=0.1, high=10.0))
        reached = ", ".join(map(str, parts.sentences)) or "none: it ends with leads"
        rows.append(f"| {runs} | {parts.explore} | {parts.lr} | {parts.confirm} | {reached} |")
    head = "| `max_runs` | explore | learning rate, at most | confirm | sentences within reach |"
    return "\n".join(["", head, "|---|---|---|---|---|", *rows, "", ""])


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        now = refreshed(text)
        if now != text:
            page.write_text(now, encoding="utf-8")
            sys.stdout.write(f"wrote {page.relative_to(ROOT)}\n")
