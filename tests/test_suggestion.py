"""`suggest` from every kind of norms, its table, and what it refuses."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.errors import NormtuneError, RecordError, SuggestionError
from normtune.records import Finding, NormRecord, Origin, RecordWriter, header, row
from normtune.suggestion import Suggestion, suggest

NORMS = np.random.default_rng(0).lognormal(-0.5, 0.6, 500)


def refused(norms, **asked):
    """The one line with which these norms are refused."""
    with pytest.raises(SuggestionError) as error:
        suggest(norms, **asked)
    assert "\n" not in str(error.value)
    return str(error.value)


def named(suggestion, name):
    """The candidate of this name."""
    return next(c for c in suggestion.candidates if c.name == name)


def test_p90_is_suggested_and_clips_a_tenth():
    """The default is numpy's p90 but for rounding, and its interval holds it."""
    s = suggest(NORMS)
    assert s.max_norm == pytest.approx(np.percentile(NORMS, 90), rel=0.02)
    assert named(s, "p90").clipped == pytest.approx(0.1, abs=0.006)
    assert s.interval.low <= s.max_norm <= s.interval.high
    assert (s.rule, s.n_steps, s.n_nonfinite) == ("p90", 500, 0)


@pytest.mark.parametrize("rule", ["p50", "p97.5", "median_multiple:3", "pascanu:1", np.median])
def test_the_rule_that_was_asked_for_is_in_the_table_once(rule):
    """Its row is marked, holds the suggested value, and no other is marked."""
    s = suggest(NORMS, rule=rule)
    marked = [c for c in s.candidates if c.suggested]
    assert [c.max_norm for c in marked] == [s.max_norm]
    assert len({c.name for c in s.candidates}) == len(s.candidates)


def test_every_row_is_computed_for_the_value_it_shows():
    """Shares and kept gradient are those of the rounded value, by torch's own clipping."""
    for c in suggest(NORMS, current=0.7).candidates:
        factors = []
        for norm in NORMS:
            parameter = torch.zeros(1, requires_grad=True)
            parameter.grad = torch.tensor([norm], dtype=torch.float32)
            before = parameter.grad.clone()
            torch.nn.utils.clip_grad_norm_([parameter], c.max_norm)
            factors.append(float(parameter.grad / before))
        clipped = np.array(factors) < 1
        assert c.clipped == pytest.approx(clipped.mean())
        assert c.first_half == pytest.approx(clipped[:250].mean())
        assert c.second_half == pytest.approx(clipped[250:].mean())
        assert c.kept == pytest.approx(np.mean(factors), abs=1e-5)


def test_one_and_ten_are_always_rows():
    """People ask about 1 and 10, so both are there, with what they do here."""
    small = suggest(0.001 * NORMS)
    large = suggest(1000 * NORMS)
    for name in ("1.0", "10.0"):
        assert named(small, name).note == "common default; same as no clipping here"
        assert named(large, name).note == "common default; normalises every step"


def test_the_current_value_is_a_row():
    """A current value has a row of its own, or marks the row of 1.0 or 10.0."""
    own = suggest(NORMS, current=0.3)
    assert named(own, "current").max_norm == 0.3
    assert "step-size limit" in named(own, "current").note
    default = suggest(NormRecord.of(NORMS, max_norm=1.0))
    assert named(default, "1.0").note.startswith("current, common default")
    assert default.current == 1.0
    assert suggest(NORMS).current is None


def test_all_kinds_of_norms_give_one_suggestion(tmp_path):
    """A record, its file, a Series, an array, a list and a tensor agree."""
    path = tmp_path / "run.norms.jsonl"
    writer = RecordWriter(path)
    lines = [row(i + 1, float(x)) for i, x in enumerate(NORMS)]
    writer.write([json.dumps(header(optimizer="SGD", lr=0.1)), *lines])
    writer.close()
    kinds = [
        NormRecord.load(path),
        path,
        str(path),
        pd.Series(NORMS),
        pd.Series(NORMS).astype("Float64"),
        NORMS,
        NORMS.tolist(),
        torch.tensor(NORMS, requires_grad=True),
    ]
    assert {suggest(kind).max_norm for kind in kinds} == {suggest(NORMS).max_norm}
    assert suggest(path).optimizer == "SGD"
    assert suggest(path).lr == 0.1


def test_a_log_of_another_tool_is_read(tmp_path):
    """A CSV with a norm column gives the suggestion of its values."""
    path = tmp_path / "metrics.csv"
    pd.DataFrame({"step": range(1, 501), "grad_norm": NORMS}).to_csv(path, index=False)
    assert suggest(path).max_norm == suggest(NORMS).max_norm


def test_missing_values_count_as_non_finite():
    """None in a list and NA in a Series are steps without a finite norm."""
    values = NORMS.tolist()
    values[3] = None
    assert suggest(values).n_nonfinite == 1
    assert suggest(pd.Series(values, dtype="Float64")).n_nonfinite == 1


@pytest.mark.parametrize(
    ("skip", "left_out"), [(0, 0), (100, 100), ("100", 100), ("10 %", 50), ("12.5%", 62)]
)
def test_skip_leaves_out_the_start(skip, left_out):
    """A count and a percentage both leave out so many first steps."""
    s = suggest(NORMS, skip=skip)
    assert s.skipped_first == left_out
    assert s.max_norm == suggest(NORMS[left_out:]).max_norm


@pytest.mark.parametrize("skip", [-1, 0.1, "0.1", "100 %", "x", True, "1e2", None])
def test_wrong_skips_are_refused(skip):
    """Anything else than a count or a percentage is a ValueError that names both."""
    with pytest.raises(ValueError, match="skip must be a count of steps or a share such as '10 %'"):
        suggest(NORMS, skip=skip)


@pytest.mark.parametrize("current", [0, -1.0, math.nan, "1.0", True])
def test_wrong_current_values_are_refused(current):
    """The current max_norm must be a number above 0."""
    with pytest.raises(ValueError, match="current must be a max_norm above 0"):
        suggest(NORMS, current=current)


@pytest.mark.parametrize(
    "norms",
    [
        ["1.0"] * 40,
        [*NORMS[:40], "oops"],
        [True] * 40,
        np.ones((40, 2)),
        [[1.0], [1.0, 2.0]],
        np.ones(40, dtype=complex),
        {"norm": [1.0]},
        b"norms",
        None,
        3.0,
        pd.DataFrame({"a": NORMS, "b": NORMS}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_kinds_are_one_clear_line(norms):
    """What is no series of real numbers is a ValueError of one line, never a traceback of numpy."""
    with pytest.raises(ValueError, match="norms must be") as error:
        suggest(norms)
    assert "\n" not in str(error.value)


def test_too_few_norms_are_refused():
    """29 finite norms are too few, 30 are enough; the line says what was needed and what came."""
    assert "at least 30 finite norms but got 0; record more steps" in refused([])
    assert "at least 30 finite norms but got 29" in refused(NORMS[:29])
    assert "(1 more were inf or nan)" in refused([*NORMS[:29], math.nan])
    assert "after the first 480 were left out" in refused(NORMS, skip=480)
    assert isinstance(suggest(NORMS[:30]), Suggestion)


def test_dead_and_diverged_norms_are_refused():
    """All zero, all non-finite and negative values are refused, each with its reason."""
    assert "all 40 are 0" in refused(np.zeros(40))
    assert "all 40 are inf or nan" in refused(np.full(40, np.inf))
    assert "step 4 holds -1" in refused([1.0, 2.0, 3.0, -1.0, *NORMS])


def test_already_clipped_norms_are_refused():
    """A pile at one value is refused, and so is a log that says that it holds clipped norms."""
    assert "20 % of these 500 lie at" in refused(np.minimum(NORMS, np.percentile(NORMS, 80)))
    assert "100 % of these 40 lie at 3: they look already clipped" in refused(np.full(40, 3.0))
    after = NormRecord.of(NORMS, origin=Origin("x.csv", "csv", "grad_norm", clip_side="after"))
    assert "x.csv (grad_norm) holds them from after it" in refused(after)


def test_blocking_findings_are_refused():
    """A finding that blocks is the reason of the refusal; one that does not is no reason."""
    text = "the clip call at train.py:9 runs in mid-accumulation"
    finding = Finding("mid-accumulation", text, blocks=True)
    record = NormRecord.of(NORMS)
    assert text in refused(replace(record, findings=(finding,)))
    assert suggest(replace(record, findings=(replace(finding, blocks=False),)))


def test_refusals_are_both_kinds_of_error():
    """A refusal is a ValueError for Python and a NormtuneError for the command line."""
    assert issubclass(SuggestionError, ValueError)
    assert issubclass(SuggestionError, NormtuneError)


def test_a_missing_file_is_a_record_error(tmp_path):
    """A path that leads nowhere is named."""
    with pytest.raises(RecordError, match=r"no such file: .*absent"):
        suggest(tmp_path / "absent.norms.jsonl")


def test_another_series_than_the_records_is_refused():
    """A record holds one series, so asking it for another is an error."""
    with pytest.raises(ValueError, match="series"):
        suggest(NormRecord.of(NORMS, series="critic"), series="actor")


def test_skipped_steps_stay_outside():
    """Steps that a GradScaler skipped count neither as steps nor as non-finite."""
    norms = NORMS.copy()
    norms[::50] = np.inf
    record = replace(NormRecord.of(norms), skipped=np.isinf(norms))
    s = suggest(record)
    assert (s.n_steps, s.n_nonfinite) == (490, 0)


def test_a_suggestion_is_frozen_and_equal_to_its_like():
    """Nothing can be set, and the same norms give an equal suggestion whose repr stays short."""
    s = suggest(NORMS)
    with pytest.raises(FrozenInstanceError):
        s.max_norm = 1.0
    assert s == suggest(NORMS) or math.isnan(s.lr)
    assert suggest(NormRecord.of(NORMS, lr=0.1)) == suggest(NormRecord.of(NORMS, lr=0.1))
    assert "record=" not in repr(s)


def test_to_dict_is_strict_json():
    """No NaN and no Infinity: what is unknown or unbounded is null."""
    s = suggest(NORMS[:40], rule="p99")
    plain = json.loads(json.dumps(s.to_dict(), allow_nan=False))
    assert plain["max_norm"] == s.max_norm
    assert plain["interval"] == [s.interval.low, None]
    assert plain["lr"] is None
    assert [c["name"] for c in plain["candidates"]] == [c.name for c in s.candidates]


def test_to_frame_has_one_row_a_candidate():
    """The table as a DataFrame, from the candidates and from the suggestion."""
    s = suggest(NORMS)
    frame = s.candidates.to_frame()
    assert list(frame.index) == [c.name for c in s.candidates]
    assert frame.loc["p90", "max_norm"] == s.max_norm
    pd.testing.assert_frame_equal(frame, s.to_frame())


def test_html_escapes_names_from_outside():
    """Series, optimizers and findings cannot smuggle in tags."""
    finding = Finding("x", "<script>alert(1)</script>\x1b[31m")
    record = replace(
        NormRecord.of(NORMS, metadata={"optimizer": "<b>SGD</b>"}), findings=(finding,)
    )
    page = suggest(record)._repr_html_()
    assert "<script>" not in page
    assert "<b>SGD" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert page.count("<tr>") == 1 + len(suggest(record).candidates)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(30, 300),
    power=st.integers(-1, 8),
    p=st.integers(1, 99),
)
def test_any_norms_give_an_honest_table(seed, n, power, p):
    """Whatever the size of the norms, more max_norm clips less, and a percentile its share."""
    norms = 10.0**power * np.random.default_rng(seed).lognormal(size=n)
    s = suggest(norms, rule=f"p{p}")
    table = sorted(s.candidates, key=lambda c: c.max_norm)
    assert all(a.clipped >= b.clipped for a, b in pairwise(table))
    assert named(s, f"p{p}").clipped == pytest.approx(1 - p / 100, abs=0.005 + 2 / n)
    assert str(s)


def test_norms_near_torchs_millionth_are_shown_as_torch_clips_them():
    """Torch adds 1e-6 to the norm: norms as small as that are mostly clipped, and that is doubted."""
    s = suggest(1e-6 * NORMS)
    assert named(s, "p90").clipped > 0.8
    assert any("adds 1e-6" in doubt for doubt in s.doubts)


def test_a_million_steps_take_well_under_a_second():
    """The whole suggestion of 1,000,000 steps; the limit is loose, since machines differ."""
    record = NormRecord.of(np.random.default_rng(0).lognormal(size=1_000_000))
    start = time.perf_counter()
    suggest(record)
    assert time.perf_counter() - start < 5.0


REAL_LOGS = os.environ.get("NORMTUNE_REAL_LOGS", "")
REFUSED = {
    "torchtitan_console_inf": "inf or nan",
    "swin_log": "are 0",
    "fairseq_json": "got 23",
    "POSTCLIP": "already clipped",
    "#after": "already clipped",
}
DOUBTED = {
    "megatron_console": "norms fell",
    "algoperf_absl_log": "diverged",
    "mmcv_log_": "the start sets this value",
    "bashkir": "the start sets this value",
    "moddednanogpt": "tighter guard",
}


def real_series():
    """Name and norms of every published series, null for non-finite ones."""
    path = Path(REAL_LOGS, "series.json")
    return json.loads(path.read_text()).items() if REAL_LOGS and path.exists() else ()


@pytest.mark.skipif(not REAL_LOGS, reason="NORMTUNE_REAL_LOGS names no folder of published logs")
@pytest.mark.parametrize("kind", [REFUSED, DOUBTED], ids=["refused", "doubted"])
def test_published_logs_are_refused_or_doubted(kind):
    """Broken and clipped logs are refused, diverged and drifting ones doubted, by their reason."""
    for part, reason in kind.items():
        found = [norms for name, norms in real_series() if part in name]
        assert found, part
        for norms in found:
            text = refused(norms) if kind is REFUSED else " ".join(suggest(norms).doubts)
            assert reason in text, part


@pytest.mark.skipif(not REAL_LOGS, reason="NORMTUNE_REAL_LOGS names no folder of published logs")
def test_published_logs_from_before_clipping_are_never_called_clipped():
    """Rounded, quantised and drifting logs of real runs are not taken for clipped ones."""
    for name, norms in real_series():
        if len(norms) < 30 or any(part in name for part in REFUSED):
            continue
        assert suggest(norms).max_norm > 0, name


def modules_after(code):
    """Which of the heavy modules a fresh Python has loaded after `code`."""
    heavy = ["torch", "optuna", "pandas", "matplotlib", "scipy.stats"]
    ask = f"import sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ask}"], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_suggesting_loads_nothing_heavy():
    """Neither torch, optuna, pandas, matplotlib nor scipy.stats; and this check can fail."""
    code = (
        "from normtune.suggestion import suggest\ns = str(suggest([i / 7 for i in range(1, 99)]))"
    )
    assert modules_after(code) == "[]"
    assert "pandas" in modules_after(f"import pandas\n{code}")
