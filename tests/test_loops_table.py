"""docs/loops.md is what the loops give now."""

import re

import loops_table
import pytest

NUMBER = re.compile(r"(?<![\w.])\d+\.\d*(?:e[+-]\d+)?")


def assert_same(found, expected):
    """Equal but for the last digits of numbers, which differ from one processor to another."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.01)


def test_the_table_of_loops_is_current():
    """If not: python tests/loops_table.py."""
    assert_same(loops_table.page(), loops_table.PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("old", "new"), [("| 1.921 |", "| 1.802 |"), ("refused", "accepted"), ("filter()", "filter")]
)
def test_a_stale_table_is_noticed(old, new):
    """Another number, another word."""
    page = loops_table.PAGE.read_text(encoding="utf-8")
    assert old in page
    with pytest.raises(AssertionError):
        assert_same(page.replace(old, new, 1), page)


def test_there_are_at_least_thirty_kinds_of_loop():
    """And each recorded norm in the table is the true one, to the last digit shown."""
    page = loops_table.PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 30
    for row in rows:
        assert row[1] in (row[2], "refused"), row
