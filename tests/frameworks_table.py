"""The rows of docs/frameworks.md: tests hold what they recorded against them.

``NORMTUNE_WRITE_TABLE=1 python -m pytest tests/test_integrations.py tests/test_distributed.py
tests/test_launch.py`` writes them anew.
"""

import os
import re
from pathlib import Path

import pytest
from pins import as_pinned

PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"
STEP = 7


def holds(name, recorded, true):
    """The row `name` of the table says what was recorded at step 7, and what was true."""
    found = (float(recorded[STEP - 1]), float(true[STEP - 1]))
    text = PAGE.read_text(encoding="utf-8")
    row = re.compile(rf"^\| {re.escape(name)} \| (\S+) \| (\S+) \|", re.MULTILINE)
    match = row.search(text)
    assert match, f"{PAGE.name} has no row {name!r}"
    if os.environ.get("NORMTUNE_WRITE_TABLE"):
        line = f"| {name} | {found[0]:#.4g} | {found[1]:#.4g} |"
        PAGE.write_text(text[: match.start()] + line + text[match.end() :], encoding="utf-8")
        return
    if as_pinned("torch", "lightning", "transformers", "accelerate"):  # others draw other weights
        assert (float(match[1]), float(match[2])) == pytest.approx(found, rel=0.01)
    assert found[0] == pytest.approx(found[1], rel=0.001)
