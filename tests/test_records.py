"""The record file: strict JSON, whole lines, torn tails, attempts, and reading back."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normtune import records
from normtune.errors import RecordError
from normtune.records import FileStore, MemoryStore, NormRecord, RecordWriter, Row, assembly, lines

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path, norms, *, attempt="a", first=1, continues=None, **facts):
    """An attempt as the recorder writes it; `norms` may hold (norm, extra) pairs."""
    store = FileStore(path, records.header(attempt=attempt, continues=continues, **facts))
    pairs = [n if isinstance(n, tuple) else (n, {}) for n in norms]
    store.rows([Row(first + i, norm, extra) for i, (norm, extra) in enumerate(pairs)])
    assert store.close()
    return path


def standard_json(line):
    """Parse as a strict reader does: no NaN, no Infinity."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(line, parse_constant=refuse)


# --- what is written is what is read --------------------------------------------------------------

numbers = st.floats(min_value=0.0, allow_infinity=True)
rows = st.lists(
    st.tuples(
        st.one_of(numbers, st.just(math.nan)),
        st.fixed_dictionaries(
            {},
            optional={
                "max_norm": numbers,
                "lr": st.floats(allow_nan=False, allow_infinity=False),
                "skipped": st.just(True),
                "belted": st.just(True),
                "groups": st.dictionaries(st.text(min_size=1, max_size=5), numbers, max_size=3),
            },
        ),
    ),
    min_size=1,
    max_size=40,
)


@quick
@given(rows)
def test_a_record_written_and_read_back_is_equal(tmp_path_factory, rows):
    """Steps, norms, flags and groups come back bit for bit; values written on change are filled."""
    path = write(tmp_path_factory.mktemp("r") / "x.norms.jsonl", rows)
    record = NormRecord.load(path)
    expected = [n for n, _ in rows]
    np.testing.assert_array_equal(record.norms, expected)
    np.testing.assert_array_equal(record.steps, np.arange(1, len(rows) + 1))
    np.testing.assert_array_equal(record.skipped, ["skipped" in e for _, e in rows])
    np.testing.assert_array_equal(record.belted, ["belted" in e for _, e in rows])
    for key in ("max_norm", "lr"):
        column = pd.Series([e.get(key, None) for _, e in rows], dtype=float).ffill()
        np.testing.assert_array_equal(getattr(record, key), column)
    for i, (_, extra) in enumerate(rows):
        for name, value in extra.get("groups", {}).items():
            assert record.groups[name][i] == value


@quick
@given(rows)
def test_memory_and_file_keep_the_same_record(tmp_path_factory, rows):
    """A recorder without a path gives what its file would have given."""
    head = records.header(attempt="a")
    path = tmp_path_factory.mktemp("r") / "x.norms.jsonl"
    for store in (memory := MemoryStore(head)), FileStore(path, head):
        store.rows([Row(i, norm, extra) for i, (norm, extra) in enumerate(rows, start=1)])
    pd.testing.assert_frame_equal(memory.record().to_frame(), NormRecord.load(path).to_frame())


@quick
@given(rows)
def test_every_line_is_strict_json(tmp_path_factory, rows):
    """No NaN and no Infinity, which jq, node and sqlite refuse or turn into numbers (row 75)."""
    path = write(tmp_path_factory.mktemp("r") / "x.norms.jsonl", rows, metadata={"x": math.nan})
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = [standard_json(line) for line in lines]
    assert all(isinstance(line, dict) for line in parsed)
    kinds = {True: "nan", False: "inf"}
    for (norm, _), line in zip(rows, parsed[1:], strict=True):
        if not math.isfinite(norm):
            assert (line["norm"], line["kind"]) == (None, kinds[math.isnan(norm)])


def test_the_check_for_strict_json_can_fail():
    """The reader of the tests above does refuse what json.dumps writes by default."""
    with pytest.raises(ValueError, match="NaN"):
        standard_json(json.dumps({"norm": math.nan}))


def test_numpy_numbers_are_written_as_numbers():
    """A float64's repr would be no JSON."""
    line = records.row(3, np.float64(1.5), max_norm=np.float64(2.0))
    assert standard_json(line) == {"step": 3, "norm": 1.5, "max_norm": 2.0}


# --- torn files ------------------------------------------------------------------------------------


@quick
@given(st.data())
def test_a_cut_costs_at_most_the_torn_line(tmp_path_factory, data):
    """Cut anywhere, a file gives all its whole rows, or a RecordError where there are none."""
    path = tmp_path_factory.mktemp("r") / "x.norms.jsonl"
    n = data.draw(st.integers(1, 30))
    write(path, [(0.5 * i, {"lr": 0.1 * i} if i % 3 == 0 else {}) for i in range(1, n + 1)])
    raw = path.read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    path.write_bytes(raw[:cut])
    whole = raw[:cut].count(b"\n") - 1
    try:
        found = NormRecord.load(path).norms
    except RecordError:
        assert whole < 1
        return
    assert len(found) in (whole, whole + 1)  # a last line may lack nothing but its newline
    np.testing.assert_array_equal(found, 0.5 * np.arange(1, len(found) + 1))


@quick
@given(st.data())
def test_a_splice_costs_at_most_the_torn_line(tmp_path_factory, data):
    """A stretch cut out of the middle takes its own rows and those that it tore."""
    path = tmp_path_factory.mktemp("r") / "x.norms.jsonl"
    write(path, [(float(i), {"skipped": True} if i % 5 == 0 else {}) for i in range(1, 41)])
    raw = path.read_bytes()
    start = data.draw(st.integers(raw.index(b"\n") + 1, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    path.write_bytes(raw[:start] + raw[end:])
    safe = {json.loads(line)["step"] for line in raw[:start].split(b"\n")[1:-1]}
    safe |= {json.loads(line)["step"] for line in raw[end:].split(b"\n")[1:] if line}
    try:
        record = NormRecord.load(path)
    except RecordError:
        assert not safe
        return
    assert safe <= set(record.steps.tolist())
    # Two halves of torn lines may by chance be a whole line; no other row can be a wrong one.
    wrong = [s for s, n in zip(record.steps, record.norms, strict=True) if s != n]
    assert len(wrong) <= 1


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = """normtune attempt continues step norm kind max_norm lr series skipped groups finding
site count default by asked imposed blocks text"""
keys = st.sampled_from(KEYS.split())
json_lines = st.dictionaries(keys, json_values, max_size=6).map(
    lambda line: json.dumps(line).encode()
)
garbage = st.one_of(
    json_lines,
    st.binary(max_size=20),
    st.sampled_from(
        [
            b'{"normtune": 1, "attempt": "a"}',
            b'{"normtune": 1, "attempt": "a", "continues": "a"}',
            b'{"step": 1, "norm": 1.0}',
            b'{"step": 1e400, "norm": 1.0}',
            b'{"step": 1e30, "norm": 1.0}',
            b'{"step": ' + b"9" * 400 + b', "norm": ' + b"9" * 400 + b"}",
            b'{"step": 2, "norm": 1e999}',
            b'{"step": 2, "norm": 1.0, "groups": [1, 2]}',
            b"[" * 100_000,
        ]
    ),
)


@settings(parent=quick, max_examples=300)
@given(st.lists(garbage, max_size=8))
def test_reading_never_raises_anything_but_a_record_error(tmp_path_factory, lines):
    """Whatever stands in the file."""
    path = tmp_path_factory.mktemp("r") / "x.norms.jsonl"
    path.write_bytes(b'{"normtune": 1, "attempt": "z"}\n' + b"\n".join(lines))
    try:
        record = NormRecord.load(path)
    except RecordError:
        return
    assert len(record.norms) == len(record.steps) == len(record.max_norm)
    assert record.current is None or math.isfinite(record.current)
    assert repr(record)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n\n", "is not a normtune record"),
        (b"PK\x03\x04\x00\x00\n", "is not a normtune record"),
        (b"step,norm\n1,2\n", "is not a normtune record"),
        (b'{"step": 1, "norm": 1.0}\n', "no header line"),
        (b'{"normtune": 1, "attempt": "a"}\n', "holds no step"),
    ],
)
def test_a_file_that_holds_no_norms_is_refused_with_the_reason(tmp_path, content, reason):
    """One line that names the file."""
    path = tmp_path / "x.norms.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=reason) as refused:
        NormRecord.load(path)
    assert "x.norms.jsonl" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_a_device_that_never_ends_its_line_is_refused():
    """Not read until the memory is full."""
    with pytest.raises(RecordError, match="no lines"):
        NormRecord.load("/dev/zero")


def test_missing_files_and_folders_are_named(tmp_path):
    """One line each."""
    with pytest.raises(RecordError, match="no such file"):
        NormRecord.load(tmp_path / "none.norms.jsonl")
    with pytest.raises(RecordError, match="cannot read"):
        NormRecord.load(tmp_path)


def test_an_append_after_a_torn_line_loses_only_the_torn_line(tmp_path):
    """The next attempt begins on a line of its own; the reader counts what it skips (row 72)."""
    path = write(tmp_path / "x.norms.jsonl", [1.0, 2.0, 3.0])
    path.write_bytes(path.read_bytes()[:-5])
    write(path, [4.0], attempt="b", continues="a", first=4)
    record = NormRecord.load(path)
    assert record.norms.tolist() == [1.0, 2.0, 4.0]
    assert "1 torn line skipped" in record.origin.notes


def test_a_number_that_was_cut_is_not_read(tmp_path):
    """The closing brace tells 123.45 from 12, which a CSV cannot (row 73)."""
    path = write(tmp_path / "x.norms.jsonl", [1.0, 123.45])
    path.write_bytes(path.read_bytes()[: -len("3.45}\n")])
    assert path.read_bytes().endswith(b'"norm": 12')
    assert NormRecord.load(path).norms.tolist() == [1.0]


def test_a_live_file_is_read_without_its_unfinished_line(tmp_path):
    """Whole lines only, at every moment of the writing (row 78)."""
    raw = write(tmp_path / "x.norms.jsonl", [1.0, 2.0]).read_bytes()
    path = tmp_path / "live.norms.jsonl"
    seen = []
    for end in range(len(raw) + 1):
        path.write_bytes(raw[:end])
        try:
            seen.append(len(NormRecord.load(path)))
        except RecordError:
            seen.append(0)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2}


# --- attempts --------------------------------------------------------------------------------------


def test_an_attempt_that_continues_another_takes_over_its_repeated_steps(tmp_path):
    """After a crash the later attempt counts, and the record says how many repeated (row 76)."""
    path = write(tmp_path / "x.norms.jsonl", [1.0, 2.0, 3.0, 4.0], attempt="a")
    write(path, [30.0, 40.0, 50.0], attempt="b", continues="a", first=3)
    record = NormRecord.load(path)
    assert record.norms.tolist() == [1.0, 2.0, 30.0, 40.0, 50.0]
    assert record.steps.tolist() == [1, 2, 3, 4, 5]
    assert any("2 repeated steps" in note for note in record.origin.notes)


def test_an_attempt_that_continues_none_stands_alone(tmp_path):
    """A second start is another run; the file says so and either can be picked."""
    path = write(tmp_path / "x.norms.jsonl", [1.0, 2.0, 3.0], attempt="a")
    write(path, [7.0], attempt="b")
    assert NormRecord.load(path).norms.tolist() == [7.0]
    assert any("1 other start of the run" in n for n in NormRecord.load(path).origin.notes)
    assert NormRecord.load(path, attempt=1).norms.tolist() == [1.0, 2.0, 3.0]
    assert NormRecord.load(path, attempt=-1).norms.tolist() == [7.0]
    with pytest.raises(RecordError, match=r"attempt must lie in 1\.\.2 but got 3"):
        NormRecord.load(path, attempt=3)


def test_steps_are_ordered_by_attempt_and_step_never_by_time(tmp_path, monkeypatch):
    """A clock that jumps back changes nothing (row 77)."""
    path = write(tmp_path / "x.norms.jsonl", [1.0, 2.0], attempt="a")
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((1980, 1, 1, 0, 0, 0, 0, 1, 0)))
    write(path, [20.0, 30.0], attempt="b", continues="a", first=2)
    assert NormRecord.load(path).norms.tolist() == [1.0, 20.0, 30.0]


def test_each_attempt_has_its_own_default_series(tmp_path):
    """A line number that moved between two starts does not mix two series."""
    path = tmp_path / "x.norms.jsonl"
    for attempt, name, norm in (("a", "train.py:10", 1.0), ("b", "train.py:12", 2.0)):
        continues = "a" if attempt == "b" else None
        store = FileStore(path, records.header(attempt=attempt, continues=continues))
        store.declare({"series": name, "by": "clip", "default": True})
        store.rows([Row(1, norm), Row(2, norm)])
        store.close()
    assert NormRecord.load(path, series="train.py:10").norms.tolist() == [1.0, 1.0]
    assert NormRecord.load(path, series="train.py:12").norms.tolist() == [2.0, 2.0]


def test_series_are_picked_by_name_and_by_their_number_of_steps(tmp_path):
    """Without a name the longest one; the others are told."""
    rows = [(1.0, {}), (5.0, {"series": "g"}), (2.0, {}), (3.0, {})]
    path = write(tmp_path / "x.norms.jsonl", rows)
    assert NormRecord.load(path).norms.tolist() == [1.0, 2.0, 3.0]
    assert NormRecord.load(path, series="g").norms.tolist() == [5.0]
    assert any("also series 'g': 1 steps" in n for n in NormRecord.load(path).origin.notes)
    with pytest.raises(RecordError, match="has no series 'd'"):
        NormRecord.load(path, series="d")


def test_two_writers_of_one_path_both_keep_their_lines(tmp_path):
    """A file is never opened to be overwritten (row 40)."""
    path = tmp_path / "x.norms.jsonl"
    stores = [FileStore(path, records.header(attempt=name)) for name in "ab"]
    for i in range(1, 200):
        for store in stores:
            store.rows([Row(i, float(i))])
    assert path.read_bytes().count(b'"step"') == 2 * 199


def test_a_file_that_is_no_record_is_never_appended_to(tmp_path):
    """A path given by mistake keeps its content."""
    path = tmp_path / "train.py"
    path.write_text("print('hello')\n", encoding="utf-8")
    with pytest.raises(RecordError, match="is no normtune record"):
        RecordWriter(path)
    assert path.read_text(encoding="utf-8") == "print('hello')\n"


@pytest.mark.parametrize("length", [0, 1, 5, 11, 12, 20, 40])
def test_a_record_goes_on_where_even_its_header_was_torn(tmp_path, length):
    """A full disk may have taken only its first bytes."""
    path = write(tmp_path / "x.norms.jsonl", [1.0])
    path.write_bytes(path.read_bytes()[:length])
    write(path, [2.0], attempt="b")
    assert NormRecord.load(path).norms.tolist() == [2.0]


# --- disks that refuse -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_keeps_the_lines_and_raises_nothing():
    """Neither write() nor close() raises; what waits is bounded (row 71)."""
    writer = RecordWriter("/dev/full", keep=10)
    for i in range(50):
        assert not writer.write([records.row(i, 1.0)])
    assert writer.error.errno == errno.ENOSPC
    assert len(writer._waiting) == 10
    assert writer.close() is False


def test_what_a_full_disk_took_in_part_is_repeated_when_there_is_room(tmp_path):
    """The torn line costs only itself: every row is read back once (row 71)."""
    script = textwrap.dedent("""
        import resource, signal, sys
        from normtune import records
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = records.RecordWriter(sys.argv[1])
        writer.write([records.dumps(records.header(attempt="a"))])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        answers = []
        for i in range(1, 101):
            limit = 333 * (1 + i // 25)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            answers.append(writer.write([records.row(i, float(i))]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        writer.write([])
        assert writer.close() and True in answers and False in answers
    """)
    path = tmp_path / "x.norms.jsonl"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)
    record = NormRecord.load(path)
    np.testing.assert_array_equal(record.norms, np.arange(1.0, 101.0))
    assert any("torn" in note for note in record.origin.notes)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    """One line with the path and the reason."""
    tmp_path.chmod(0o500)
    with pytest.raises(RecordError, match="Permission denied"):
        RecordWriter(tmp_path / "x.norms.jsonl")


def test_a_path_that_cannot_be_a_file_is_named(tmp_path):
    """One line with the path and the reason, for root too."""
    (tmp_path / "taken").write_text("", encoding="utf-8")
    for path in (tmp_path, tmp_path / "taken" / "x.norms.jsonl", "/proc/x.norms.jsonl"):
        with pytest.raises(RecordError, match="cannot write the record"):
            RecordWriter(path)


def test_sigkill_loses_no_written_line_and_tears_none(tmp_path):
    """Whole lines reach the file at each write, whenever the process dies (row 70)."""
    script = textwrap.dedent("""
        import itertools, sys
        from normtune import records
        store = records.FileStore(sys.argv[1], records.header(attempt="a"))
        for i in itertools.count(1):
            store.rows([records.Row(i, float(i))])
            print(i, flush=True)
    """)
    random = np.random.default_rng(1)
    for turn in range(5):
        path = tmp_path / f"{turn}.norms.jsonl"
        command = [sys.executable, "-c", script, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(random.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
            told = process.stdout.read().split(b"\n")[:-1]
        record = NormRecord.load(path)
        assert len(record) >= (int(told[-1]) if told else 1)
        np.testing.assert_array_equal(record.norms, np.arange(1.0, len(record) + 1))
        assert record.origin.notes == ()


# --- a million steps -------------------------------------------------------------------------------


def test_a_million_steps_read_as_pandas_reads_them(tmp_path):
    """Every norm bit for bit, over the block borders of the reader."""
    norms = np.random.default_rng(0).lognormal(size=1_000_000)
    path = tmp_path / "x.norms.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.write(records.dumps(records.header(attempt="a")) + "\n")
        file.writelines(f"{records.row(i, x)}\n" for i, x in enumerate(norms.tolist(), start=1))
    record = NormRecord.load(path)
    np.testing.assert_array_equal(record.norms, norms)
    assert record.steps[-1] == 1_000_000
    head = pd.read_json(path, lines=True, nrows=50_001, precise_float=True)[1:]
    np.testing.assert_array_equal(record.norms[:50_000], head["norm"])
    np.testing.assert_array_equal(record.steps[:50_000], head["step"])


def test_a_large_file_gives_each_double_bit_for_bit(tmp_path):
    """Random bit patterns: from the smallest denormal number to the largest."""
    bits = np.random.default_rng(1).integers(0, 0x7FF << 52, size=40_000, dtype=np.uint64)
    norms = bits.view(np.float64)
    path = tmp_path / "x.norms.jsonl"
    rows = [records.row(i, x) for i, x in enumerate(norms.tolist(), start=1)]
    path.write_text("\n".join([records.dumps(records.header(attempt="a")), *rows, ""]))
    assert path.stat().st_size > lines.LARGE_BYTES
    np.testing.assert_array_equal(NormRecord.load(path).norms, norms)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1 2, "norm": 1.5}',
        '{"step": 1, "norm": 1.5 2.5}',
        '{"step": , "norm": 1.5}',
        '{"step": 7, "norm": }',
        '{"step": 7, "norm": 1.5e}',
        '{"step": 7.0, "norm": 1.5}',
        '{"step": 99999999999999999999, "norm": 1.5}',
        '{"step": 7, "norm": 3}',
        "",
    ],
)
@pytest.mark.parametrize("where", [9_000, 20_000])
def test_an_odd_line_in_a_large_file_is_read_as_line_by_line(tmp_path, monkeypatch, line, where):
    """The fast reading gives way; what comes before and after is as it was."""
    rows = [records.row(i, 0.1 + i / 3) for i in range(1, 20_001)]
    rows.insert(where, line)
    path = tmp_path / "x.norms.jsonl"
    path.write_text("\n".join([records.dumps(records.header(attempt="a")), *rows, ""]))

    def read():
        found = lines.Lines.read(path)
        blocks = [block for attempt in found.attempts for block in attempt.blocks]
        steps = np.concatenate([block.steps for block in blocks])
        return steps, np.concatenate([block.norms for block in blocks]), found.torn

    seen = mock.Mock(wraps=lines._large_table)
    monkeypatch.setattr(lines, "_large_table", seen)
    fast = read()
    assert seen.call_count
    monkeypatch.setattr(lines, "_parse_plain", lambda _: None)
    slow = read()
    assert len(slow[0]) >= 20_000
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_learning_rate_that_changes_at_every_step_is_read_in_linear_time(tmp_path):
    """A cosine schedule writes it in every line; filling it forward must not be quadratic."""
    n = 200_000
    details = [(i, {"lr": float(i)}) for i in range(n)]
    filled = assembly._forward(assembly._Rows(details=details, n=n), "lr", math.nan)
    np.testing.assert_array_equal(filled, np.arange(n, dtype=float))


def test_values_that_change_between_rows_are_filled_forward():
    """From the header on, until they change."""
    rows = assembly._Rows(details=[(2, {"lr": 0.5}), (3, {}), (5, {"lr": "inf"})], n=7)
    np.testing.assert_array_equal(
        assembly._forward(rows, "lr", 1.0), [1, 1, 0.5, 0.5, 0.5, math.inf, math.inf]
    )


# --- NormRecord ------------------------------------------------------------------------------------


def test_statistics_see_finite_norms_of_steps_that_happened(tmp_path):
    """Neither non-finite norms nor steps that a GradScaler skipped."""
    rows = [1.0, (math.inf, {}), (5.0, {"skipped": True}), (math.nan, {}), 2.0]
    record = NormRecord.load(write(tmp_path / "x.norms.jsonl", rows))
    assert record.finite.tolist() == [1.0, 2.0]
    assert len(record) == 5
    assert record.skip(4).finite.tolist() == [2.0]


def test_the_loops_own_value_is_known_also_where_another_was_imposed(tmp_path):
    """`current` is what the loop asked for, never what normtune put in its place."""
    rows = [(1.0, {"max_norm": math.inf, "asked": 0.5, "imposed": True}), 1.0]
    assert NormRecord.load(write(tmp_path / "a.norms.jsonl", rows)).current == 0.5
    rows = [(1.0, {"max_norm": 0.25}), 1.0]
    assert NormRecord.load(write(tmp_path / "b.norms.jsonl", rows)).current == 0.25
    rows = [(1.0, {"max_norm": 0.25, "imposed": True}), 1.0]
    assert NormRecord.load(write(tmp_path / "c.norms.jsonl", rows)).current is None


def test_plain_numbers_make_a_record():
    """Lists, arrays and pandas Series; strings and tables are refused."""
    assert NormRecord.of(pd.Series([1, 2])).norms.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="must be numbers"):
        NormRecord.of(["a", "b"])
    with pytest.raises(ValueError, match="one-dimensional"):
        NormRecord.of([[1.0, 2.0]])


def test_a_frame_has_one_row_a_step(tmp_path):
    """With a column for each group."""
    rows = [(1.0, {"groups": {"a": 0.6, "b": 0.8}}), (2.0, {"groups": {"a": 2.0}})]
    frame = NormRecord.load(write(tmp_path / "x.norms.jsonl", rows)).to_frame()
    assert list(frame["step"]) == [1, 2]
    np.testing.assert_array_equal(frame["group b"], [0.8, np.nan])
