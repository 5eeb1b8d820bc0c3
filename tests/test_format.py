"""Suggestions as text: the form of the table, the paste lines, and no control characters."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune import format as formatting
from normtune.records import Finding, NormRecord, Origin
from normtune.suggestion import suggest

# 0.01, 0.02 .. 1.00 five times over in a scattered order, made distinct by millionths: p90 is 0.901.
KNOWN = np.random.default_rng(0).permutation(np.tile(np.arange(1, 101) / 100, 5))
KNOWN += np.arange(500) * 1e-6


def text_of(norms=KNOWN, *, width=100, metadata=None, **asked):
    """The printed suggestion of a record at lr 0.1 under SGD."""
    facts = {"optimizer": "SGD"} | (metadata or {})
    record = norms
    if not isinstance(norms, NormRecord):
        record = NormRecord.of(norms, lr=0.1, metadata=facts)
    return formatting.format_suggestion(suggest(record, **asked), width=width)


def table(text):
    """The lines of the table, headings included."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  candidate"))
    return lines[start : lines.index("doubts")]


def test_the_head_says_what_the_value_stands_on():
    """Value, rule, number of norms, learning rate, optimizer and interval, in two lines."""
    head = text_of().split("  candidate")[0]
    assert head.startswith("suggested max_norm   0.901 ")
    flat = " ".join(head.split())
    assert "p90 of 500 unclipped norms at lr 0.1 (SGD); p90 of such steps lies in" in flat
    assert flat.endswith("(this window only)")


def test_the_table_has_its_columns_and_rows():
    """Five columns, one row a candidate, the suggestion and the defaults marked."""
    rows = table(text_of())
    assert rows[0].split("  ")[1] == "candidate"
    assert [r.split("   ")[0].strip() for r in rows[1:]] == [
        "p10", "p50", "p90", "p99", "2 x median", "1.0", "10.0",
    ]  # fmt: skip
    assert [r for r in rows if "<- suggested" in r] == [rows[3]]
    assert "common default; same as no clipping here" in rows[7]
    assert "normalises nearly every step" in rows[1]


def test_columns_are_aligned():
    """Every figure ends where its heading ends."""
    rows = table(text_of(current=0.05, rule="p97.5"))
    for heading in formatting.HEADINGS[1:]:
        end = rows[0].index(heading) + len(heading)
        for line in rows[1:]:
            assert line[end - 1] != " "
            assert line[end : end + 1] in ("", " ")


def test_the_closing_sentence_has_no_dash():
    """Doubts are a list; what the suggestion is for stands below it."""
    lines = text_of(optimizer="AdamW").splitlines()
    start = lines.index("doubts")
    assert lines[start + 1].startswith("  - under AdamW")
    assert any(line.startswith("  p90 is a guard: it acts on spikes.") for line in lines)


def test_the_paste_lines_hold_the_value():
    """What is pasted is the suggested value, for a loop, for Lightning and for the HF Trainer."""
    last = text_of().splitlines()[-2:]
    assert last == [
        "paste   torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.901)",
        "        Trainer(gradient_clip_val=0.901)   TrainingArguments(max_grad_norm=0.901)",
    ]


@pytest.mark.parametrize(("norm_type", "code"), [(1.0, "1.0"), ("inf", 'float("inf")')])
def test_another_norm_type_is_pasted_too(norm_type, code):
    """A record of L1 or maximum norms pastes norm_type, and no Trainer line, which means L2."""
    lines = text_of(metadata={"norm_type": norm_type}).splitlines()
    assert lines[-1].endswith(f"max_norm=0.901, norm_type={code})")
    assert not any("Trainer" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_prose_keeps_to_the_width(width):
    """All but the table and the lines to paste fit the width."""
    text = text_of(np.append(KNOWN, [math.nan] * 50), width=width)
    free = [line for line in text.splitlines() if line not in table(text)]
    assert all(len(line) <= width for line in free if "max_norm=" not in line and "Tr" not in line)


def test_the_rate_is_always_named():
    """Unknown and falling learning rates are said to be so."""
    assert "at unknown lr;" in formatting.headline(suggest(KNOWN))
    falling = NormRecord.of(KNOWN, lr=np.linspace(0.2, 0.1, 500))
    assert "at lr 0.2 falling to 0.1;" in formatting.headline(suggest(falling))


def test_norms_of_unknown_side_are_not_called_unclipped():
    """Only norms known to be from before clipping are called unclipped."""
    origin = Origin(path="train.log", clip_side="unknown")
    assert "p90 of 500 norms at" in formatting.headline(
        suggest(NormRecord.of(KNOWN, origin=origin))
    )


def test_intervals_without_an_end_are_words():
    """No upper bound, no bound at all and no interval are told apart."""
    few = KNOWN[:35]
    assert "lies above" in formatting.headline(suggest(few, rule="p90"))
    assert "has no bounds" in formatting.headline(suggest(few, rule="p100"))
    assert formatting.headline(suggest(few, rule=np.median)).endswith("lr (this window only)")


def test_left_out_steps_and_notes_are_named():
    """A skipped start and what the source says of itself are part of the text."""
    origin = Origin(path="run.csv", notes=("also series 'critic': 40 steps",))
    text = text_of(NormRecord.of(KNOWN, origin=origin), skip=20)
    assert "first 20 left out" in " ".join(text.split())
    assert "source   also series 'critic': 40 steps" in text


def test_names_from_outside_cannot_steer_the_terminal():
    """Escape sequences and line breaks in names and findings lose their control characters."""
    finding = Finding("x", "clip at \x1b[2Jtrain.py:1\nsecond line\r")
    record = replace(
        NormRecord.of(KNOWN, metadata={"optimizer": "S\x1bGD\x07"}), findings=(finding,)
    )
    text = text_of(record)
    assert "(SGD)" in text
    assert all(c == "\n" or c.isprintable() for c in text)


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_numbers_keep_three_digits(value):
    """The text of a number reads back within half a unit of its third digit."""
    assert float(formatting.number(value)) == pytest.approx(value, rel=0.0051)


@given(st.integers(0, 1000), st.integers(1, 1000))
def test_shares_of_nothing_and_everything_are_exact(part, whole):
    """0 % and 100 % are printed only for none and for all."""
    share = min(part, whole) / whole
    text = formatting.share(share)
    assert (text == "0 %") == (share == 0)
    assert (text == "100 %") == (share == 1)


def test_aligned_numbers_share_their_decimals():
    """Decimals are common, unless sizes lie too far apart."""
    assert formatting.aligned([0.5, 12.25]) == ["0.50", "12.25"]
    assert formatting.aligned([150.0, 10.0]) == ["150", "10"]
    assert formatting.aligned([1e-7, 10.0]) == ["1e-7", "10"]
