"""`normtune.sources` gives the norms of other tools' logs, or says why it cannot."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from source_samples import NORMS, ONES, SAMPLES, TENS, hf_console, trainer_state

from normtune import sources
from normtune.errors import RecordError
from normtune.records import NormRecord, RecordWriter, header, row
from normtune.suggestion import suggest

ids = {"ids": lambda sample: sample.name}


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows(norms=NORMS, steps=TENS, key="grad_norm", **rest):
    return [{"step": s, key: n} | rest for s, n in zip(steps, norms, strict=True)]


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, **ids)
def test_reads_every_family(tmp_path, sample):
    """Values, steps, key, side of clipping and meaning are those that the framework wrote."""
    record = sources.read(write(tmp_path, sample.name, sample.content))
    np.testing.assert_array_equal(record.norms, sample.norms)
    np.testing.assert_array_equal(record.steps, ONES if sample.steps is None else sample.steps)
    found = (record.origin.key, record.origin.clip_side, record.origin.value)
    assert found == (sample.key, sample.side, sample.value)
    assert record.current == sample.max_norm


@pytest.mark.parametrize("sample", SAMPLES, **ids)
def test_lists_what_it_reads(tmp_path, sample):
    """The list of series holds the series that is read, with its range and its steps."""
    path = write(tmp_path, sample.name, sample.content)
    record = sources.read(path)
    found = next(s for s in sources.list_series(path) if s.key == record.origin.key)
    assert (found.lowest, found.highest) == (record.norms.min(), record.norms.max())
    assert (found.clip_side, found.path, found.whole) == (sample.side, str(path), True)
    if sample.steps is not None:
        assert (found.first_step, found.last_step) == (sample.steps[0], sample.steps[-1])


@pytest.mark.parametrize("sample", SAMPLES, **ids)
def test_the_name_of_the_file_does_not_matter(tmp_path, sample):
    """A file is recognised by its content where its name says nothing."""
    if (
        "Wall time" in sample.content[:20].decode(errors="replace")
        or sample.name == "grad_norms.json"
    ):
        pytest.skip("only the name of this file says what it holds")
    record = sources.read(write(tmp_path, "download (3)", sample.content))
    np.testing.assert_array_equal(record.norms, sample.norms)


@pytest.mark.parametrize("sample", SAMPLES, **ids)
def test_reads_a_key_that_is_asked_for(tmp_path, sample):
    """The key that the list shows can be asked for and gives the same values."""
    path = write(tmp_path, sample.name, sample.content)
    np.testing.assert_array_equal(sources.read(path, key=sample.key).norms, sample.norms)


def test_reads_its_own_record(tmp_path):
    """A normtune record is read as NormRecord.load reads it, compressed too, and keeps its origin."""
    path = tmp_path / "run.norms.jsonl"
    writer = RecordWriter(path)
    lines = [json.dumps(header(optimizer="SGD")), *(row(i + 1, n) for i, n in enumerate(NORMS))]
    assert writer.write(lines)
    assert writer.close()
    packed = write(tmp_path, "run.norms.jsonl.gz", gzip.compress(path.read_bytes()))
    for source in (path, packed, io.BytesIO(path.read_bytes())):
        record = sources.read(source)
        np.testing.assert_array_equal(record.norms, NormRecord.load(path).norms)
        assert record.origin.kind == "normtune record"
    assert sources.list_series(path)[0].points == len(NORMS)


# --- one sentence ---------------------------------------------------------------------------------


def test_describes_what_was_taken(tmp_path):
    """The sentence names key, file, count, cadence, side and meaning."""
    record = sources.read(write(tmp_path, "trainer_state.json", trainer_state()))
    said = "grad_norm from trainer_state.json, 40 values, one per 10 steps, pre-clip, last step of each window"
    assert sources.describe(record) == said
    console = sources.read(write(tmp_path, "out.txt", hf_console(NORMS, quoted=True)))
    assert "steps not logged" in sources.describe(console)


# --- choice ---------------------------------------------------------------------------------------


def test_asks_where_several_are_totals(tmp_path):
    """Two optimizers' norms are listed and not chosen from."""
    path = write(
        tmp_path,
        "m.jsonl",
        jsonl(rows(**{"actor/grad_norm": 1.0, "critic/grad_norm": 2.0}, key="x")),
    )
    with pytest.raises(
        RecordError, match=r"holds 2 gradient norms.*'actor/grad_norm', 'critic/grad_norm'.*--key"
    ):
        sources.read(path)
    assert sources.read(path, key="critic/grad_norm").norms[0] == 2.0
    assert {s.key for s in sources.list_series(path)} == {"actor/grad_norm", "critic/grad_norm"}


def test_one_series_under_two_names_is_one(tmp_path):
    """The same values under two names need no choice."""
    path = write(
        tmp_path, "m.jsonl", jsonl([r | {"train/grad_norm": r["grad_norm"]} for r in rows()])
    )
    assert len(sources.read(path)) == len(NORMS)


def test_refuses_the_norm_of_one_group(tmp_path):
    """A group's norm is no total: refused, but given to who names it, with a note."""
    path = write(
        tmp_path, "m.jsonl", jsonl(rows(key="grad/norm_gamma", **{"norm/avg_shift_k": -6.0}))
    )
    with pytest.raises(RecordError, match="norm of one group of parameters"):
        sources.read(path)
    record = sources.read(path, key="grad/norm_gamma")
    assert any("not named as a total" in note for note in record.origin.notes)
    assert [s.whole for s in sources.list_series(path)] == [False]


def test_takes_the_total_beside_layers(tmp_path):
    """Norms of layers stand beside the total and are counted, not taken."""
    head = "step," + ",".join(f"grad_norm/layer_{i}" for i in range(3)) + ",grad_norm\n"
    body = "".join(f"{s},1,2,3,{n}\n" for s, n in zip(TENS, NORMS, strict=True))
    record = sources.read(write(tmp_path, "m.csv", head + body))
    np.testing.assert_array_equal(record.norms, NORMS)
    assert any("also 3 norms of layers" in note for note in record.origin.notes)


def test_says_before_and_after(tmp_path):
    """Asked for by name, the values after clipping come as such."""
    text = jsonl([r | {"grad_norm_clipped": min(r["grad_norm"], 0.5)} for r in rows()])
    path = write(tmp_path, "m.jsonl", text)
    assert sources.read(path).origin.clip_side == "unknown"
    assert sources.read(path, key="grad_norm_clipped").origin.clip_side == "after"


def test_a_weak_name_is_taken_and_said(tmp_path):
    """A column called only norm is taken where there is no better one, with a note."""
    record = sources.read(write(tmp_path, "m.csv", "step,loss,norm\n" + "1,2,0.5\n2,2,0.6\n" * 20))
    assert any("says only 'norm'" in note for note in record.origin.notes)


@pytest.mark.parametrize("key", ["loss_x", "LOSS_X", "my loss"])
def test_any_column_can_be_asked_for(tmp_path, key):
    """A key of the user's own is found in JSON Lines, in CSV and in text."""
    name = key.lower() if key == "LOSS_X" else key
    files = (
        write(tmp_path, "m.jsonl", jsonl(rows(key=name))),
        write(
            tmp_path,
            "m.csv",
            f"step,{name}\n" + "".join(f"{s},{n}\n" for s, n in zip(TENS, NORMS, strict=True)),
        ),
        write(
            tmp_path,
            "m.log",
            "".join(f"step {s}: {name} = {n}\n" for s, n in zip(TENS, NORMS, strict=True)),
        ),
    )
    for path in files:
        record = sources.read(path, key=key)
        np.testing.assert_array_equal(record.norms, NORMS)
        np.testing.assert_array_equal(record.steps, TENS)


@pytest.mark.parametrize("line", ["Block 0 W_Q grad norm: 9.0", "discriminator grad norm = 9.0", "Max grad norm: 9.0",
                                  "max_grad_norm: 9.0", "param norm: 9.0", "layer norm 9.0", "grad norm ratio: 9.0"])  # fmt: skip
def test_other_norms_in_text_are_left_alone(tmp_path, line):
    """What is the norm of something else, or a setting, is no value of the total norm."""
    text = "".join(
        f"{line}\nIter {s} | Loss: 2.0 | Grad Norm: {n}\n" for s, n in zip(TENS, NORMS, strict=True)
    )
    record = sources.read(write(tmp_path, "a.log", text))
    np.testing.assert_array_equal(record.norms, NORMS)
    np.testing.assert_array_equal(record.steps, TENS)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.log", b"", "is empty"),
        ("a.log", b"\n \n", "is empty"),
        ("a.bin", bytes(range(32)) * 100, "is binary"),
        ("model.pt", b"PK\x03\x04" + b"\0" * 100, "zip archive"),
        ("mlflow.db", b"SQLite format 3\0" + b"\0" * 100, "SQLite"),
        ("args.bin", b"\x80\x02}q\0.", "pickle"),
        ("a.log", b"hello\nworld\n", "holds no gradient norm"),
        ("a.csv", b"step,loss\n1,2\n2,3\n", "holds no gradient norm"),
        ("a.csv", b"step,grad_norm\n1,high\n2,low\n", "holds text such as 'high'"),
        ("a.csv", b"step,grad_norm\n1,-3\n2,-4\n", "negative values such as -3"),
        ("trainer_log.jsonl", b'{"current_steps": 5, "total_steps": 9, "loss": 1, "percentage": 1}\n' * 3,
         "trainer_state.json"),
        ("trainer_state.json", b'{"log_history": [{"loss": 1.0, "step": 1}], "global_step": 1}', "since 4.38"),
        ("train.txt", b"{'loss': 1.2, 'learning_rate': 1e-5, 'epoch': 0.1}\n" * 9, "since transformers 4.38"),
        ("run-a-tag-train_loss.csv", b"Wall time,Step,Value\n1.0,1,2.0\n", "its name says 'train_loss'"),
    ],
)  # fmt: skip
def test_refuses_in_one_line(tmp_path, name, content, says):
    """What cannot be read is refused in one line that says why and what to do."""
    with pytest.raises(RecordError, match=says) as caught:
        sources.read(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_refuses_what_is_not_there(tmp_path):
    """A missing file, key, run and series are each named."""
    path = write(tmp_path, "m.jsonl", jsonl(rows()))
    with pytest.raises(RecordError, match=r"no such file: .*nothing\.log"):
        sources.read(tmp_path / "nothing.log")
    with pytest.raises(RecordError, match="no values under the key 'gnorm'; it has 'grad_norm'"):
        sources.read(path, key="gnorm")
    with pytest.raises(RecordError, match=r"attempt must lie in 1\.\.1"):
        sources.read(path, attempt=2)
    with pytest.raises(RecordError, match="no normtune record"):
        sources.read(path, series="x")
    with pytest.raises(RecordError, match="holds no log"):
        sources.read(
            tmp_path / "m.jsonl" / ".." / "empty"
            if (tmp_path / "empty").mkdir()
            else tmp_path / "empty"
        )


# --- numbers --------------------------------------------------------------------------------------


def test_non_finite_values_are_kept(tmp_path):
    """NaN and inf come through every spelling, bare in JSON too."""
    spelled = [
        "NaN",
        "Infinity",
        '"inf"',
        '"nan"',
        "0.5",
        '"-1.0"',
        "null",
        '"1.5K"',
        '"1,234.5"',
        "[0.25]",
    ]
    text = "".join(f'{{"step": {i}, "grad_norm": {value}}}\n' for i, value in enumerate(spelled))
    record = sources.read(write(tmp_path, "m.jsonl", text))
    want = [math.nan, math.inf, math.inf, math.nan, 0.5, 1500.0, 1234.5, 0.25]
    np.testing.assert_array_equal(record.norms, want)
    assert any("not computed" in note for note in record.origin.notes)


@pytest.mark.parametrize("text", ["nan", "inf", "NaN", "Infinity", "tensor(inf)"])
def test_non_finite_values_in_text(tmp_path, text):
    """A diverged step is a value, not a gap."""
    lines = "".join(f"step: {i}  loss: 1  grad_norm:  {text}  memory: 1GiB\n" for i in range(5))
    assert not np.isfinite(sources.read(write(tmp_path, "a.log", lines)).norms).any()


# --- several runs, ranks, resumes -----------------------------------------------------------------


def test_several_runs_in_one_file(tmp_path):
    """The last run is taken; --attempt picks another, 0 takes all; the note counts them."""
    twice = rows(NORMS[:30], TENS[:30]) + rows(NORMS[30:], TENS[:10])
    path = write(tmp_path, "m.jsonl", jsonl(twice))
    record = sources.read(path)
    np.testing.assert_array_equal(record.norms, NORMS[30:])
    assert any(
        "2 runs in the file with 30, 10 values, run 2 is taken" in n for n in record.origin.notes
    )
    np.testing.assert_array_equal(sources.read(path, attempt=1).norms, NORMS[:30])
    np.testing.assert_array_equal(sources.read(path, attempt=-2).norms, NORMS[:30])
    np.testing.assert_array_equal(sources.read(path, attempt=0).norms, NORMS)


def test_several_runs_without_steps(tmp_path):
    """The epoch of a console log that falls back begins a new run."""
    epochs = [0.01 * (i % 25 + 1) for i in range(40)]
    text = hf_console(NORMS, quoted=True, epochs=epochs)
    np.testing.assert_array_equal(sources.read(write(tmp_path, "a.log", text)).norms, NORMS[25:])


def test_a_resume_is_one_run(tmp_path):
    """Steps that fall back to a checkpoint belong to the same run; the repeats are counted."""
    path = write(tmp_path, "m.jsonl", jsonl(rows(steps=TENS[:25] + TENS[20:35])))
    record = sources.read(path)
    np.testing.assert_array_equal(record.norms, NORMS)
    assert any("5 steps occur again" in note for note in record.origin.notes)


def test_steps_that_restart_each_epoch_are_one_run(tmp_path):
    """Iterations counted within the epoch become steps that go on."""
    text = "epoch,batch,grad_norm\n" + "".join(
        f"{i // 10},{i % 10},{n}\n" for i, n in enumerate(NORMS)
    )
    record = sources.read(write(tmp_path, "m.csv", text))
    np.testing.assert_array_equal(record.norms, NORMS)
    assert (np.diff(record.steps) >= 0).all()
    bare = "batch,grad_norm\n" + "".join(f"{i % 10},{n}\n" for i, n in enumerate(NORMS))
    record = sources.read(write(tmp_path, "n.csv", bare))
    np.testing.assert_array_equal(record.norms, NORMS)
    assert any("taken as epochs" in note for note in record.origin.notes)


@pytest.mark.parametrize("ranks", [2, 8])
def test_copies_of_other_ranks_are_dropped(tmp_path, ranks):
    """One line printed by every rank counts once, in whatever order the ranks print."""
    lines = [
        f"[rank{r}]:[titan] INFO - step: {s:2d}  loss: 1.0  grad_norm: {n + (0.01 * r):7.4f}  memory: 1GiB"
        for s, n in zip(TENS, NORMS, strict=True)
        for r in range(ranks)
    ]
    record = sources.read(write(tmp_path, "a.log", "\n".join(lines) + "\n"))
    np.testing.assert_allclose(record.norms, NORMS, atol=1e-9)


@pytest.mark.parametrize("factor", [1.0, 1.0001, 1.1])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_that_tell_other_norms_are_doubted(tmp_path, order, factor):
    """The norms of one rank are taken as before, with the reason why they may not be the model's."""
    lines = [
        f"[rank{r}]:[titan] INFO - step: {s:2d}  loss: 1.0  grad_norm: {n * factor**r:7.4f}"
        for s, n in zip(TENS, NORMS, strict=True)
        for r in order
    ]
    record = sources.read(write(tmp_path, "a.log", "\n".join(lines) + "\n"))
    np.testing.assert_allclose(record.norms, np.array(NORMS) * factor ** order[0], rtol=1e-4)
    assert [finding.kind for finding in record.findings] == ["ranks-differ"] * (factor == 1.1)
    assert not any(finding.blocks for finding in record.findings)


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_steps_with_several_values_are_doubted(tmp_path, factor):
    """Each rank logs its own norm, and no line says which rank it is of."""
    rows_of_ranks = [
        {"step": s, "grad_norm": n * factor**r}
        for s, n in zip(TENS, NORMS, strict=True)
        for r in range(4)
    ]
    record = sources.read(write(tmp_path, "m.jsonl", jsonl(rows_of_ranks)))
    said = [finding.text for finding in record.findings]
    assert len(said) == (factor == 1.1)
    assert all(f"{len(NORMS)} of {len(NORMS)} steps have several values" in s for s in said)


def test_a_resume_that_repeats_a_few_steps_is_no_difference_of_ranks(tmp_path):
    """Only where most steps have several values do ranks come into question."""
    again = [*rows()[:20], *({**row, "grad_norm": row["grad_norm"] * 2} for row in rows()[17:])]
    assert sources.read(write(tmp_path, "m.jsonl", jsonl(again))).findings == ()


def test_copies_without_a_rank_are_dropped(tmp_path):
    """The same step and value within a few lines is a copy."""
    lines = [
        f"step {s} grad_norm {n}\n" for s, n in zip(TENS, NORMS, strict=True) for _ in range(4)
    ]
    np.testing.assert_array_equal(
        sources.read(write(tmp_path, "a.log", "".join(lines))).norms, NORMS
    )


def test_rounded_steps_are_no_steps(tmp_path):
    """LeRobot's step:2K stands for many steps: equal values under it are not copies."""
    lines = [f"INFO step:{2 + i // 20}K smpl:9K loss:0.1 grdn:0.5 lr:1e-5\n" for i in range(40)]
    record = sources.read(write(tmp_path, "a.log", "".join(lines)))
    assert len(record) == 40
    assert record.metadata["steps"] == "not logged"


def test_a_value_without_its_step_is_kept(tmp_path):
    """One row in a hundred that lacks the step costs nothing."""
    lost = [{"grad_norm": 9.0}, *rows(), {"grad_norm": 8.0}, {"grad_norm": 8.0}]
    record = sources.read(write(tmp_path, "m.jsonl", jsonl(lost)))
    np.testing.assert_array_equal(record.norms, [9.0, *NORMS, 8.0, 8.0])
    np.testing.assert_array_equal(record.steps, [10, *TENS, 400, 400])


def test_times_of_day_are_no_ranks(tmp_path):
    """A line that begins with the time is nobody's copy."""
    lines = [
        f"{8 + i // 10}:{i:02d}:07 step {s} grad_norm {n}\n"
        for i, (s, n) in enumerate(zip(TENS, NORMS, strict=True))
    ]
    np.testing.assert_array_equal(
        sources.read(write(tmp_path, "a.log", "".join(lines))).norms, NORMS
    )


# --- notes ----------------------------------------------------------------------------------------


def test_notes_on_cadence(tmp_path):
    """A thin sample and uneven steps are said."""
    steps = [i * 10 + (i % 3) for i in range(40)]
    notes = " | ".join(
        sources.read(write(tmp_path, "m.jsonl", jsonl(rows(steps=steps)))).origin.notes
    )
    assert "one value in 11 steps" in notes
    assert "uneven cadence: 8 to 11" in notes


def test_notes_on_torn_lines(tmp_path):
    """Lines that no reader understands are counted."""
    text = jsonl(rows()) + '{"step": 410, "grad_no'
    record = sources.read(write(tmp_path, "m.jsonl", text))
    np.testing.assert_array_equal(record.norms, NORMS)
    assert "1 torn line skipped" in record.origin.notes


# --- the run's own max_norm -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "stated"),
    [
        ("config.yaml", "optim:\n  clip: 0.7\n", 0.7),
        ("hparams.yaml", "gradient_clip_val: 0.5\nmodel: !!python/object:x.Y {}\n", 0.5),
        ("config.json", '{"optimizer": {"grad_clip_norm": 10}}', 10.0),
        ("args.json", '{"max_grad_norm": "1e-1"}', 0.1),
        (".hydra/config.yaml", "trainer:\n  max_grad_norm: 2\n", 2.0),
        ("config.yml", "grad_clip:\n  max_norm: 35\n  norm_type: 2\n", 35.0),
        ("config.yaml", "wandb_version: 1\nmax_grad_norm:\n  desc: null\n  value: 0.3\n", 0.3),
        ("config.yaml", "gradient_clip_val: 3\ngradient_clip_algorithm: value\n", None),
        ("config.yaml", "actor: {grad_clip: 1.0}\ncritic: {grad_clip: 2.0}\n", None),
        ("config.yaml", "max_grad_norm: 0\n", None),
        ("config.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nclip_grad: 4.0\n", 4.0),
        ("config.json", "{torn", None),
    ],
)
def test_finds_the_max_norm_beside_the_log(tmp_path, name, config, stated):
    """A config beside the log states the run's max_norm; clipping by value and 0 are none."""
    write(tmp_path, name, config)
    record = sources.read(write(tmp_path, "m.jsonl", jsonl(rows())))
    assert record.current == stated
    if stated is not None:
        assert any(f"in {name} beside it" in note for note in record.origin.notes)


def test_clipping_off_is_known_as_such(tmp_path):
    """A stated 0 means off: no current max_norm, and a note."""
    write(tmp_path, "config.yaml", "max_grad_norm: 0.0\n")
    record = sources.read(write(tmp_path, "m.jsonl", jsonl(rows())))
    assert record.metadata["asked_max_norm"] == math.inf
    assert any("clipping is off" in note for note in record.origin.notes)


# --- bytes ----------------------------------------------------------------------------------------

PLAIN = "".join(f"step {s} grad_norm {n}\n" for s, n in zip(TENS, NORMS, strict=True))


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(PLAIN.encode()),
        bz2.compress(PLAIN.encode()),
        PLAIN.encode("utf-16"),
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.replace("step", "\x1b[31mstep\x1b[0m").encode(),
        PLAIN.encode() + b"\xff\xfe\xe9 caf\xe9\n",
        b"x" * 5_000_000 + b"\n" + PLAIN.encode(),
        PLAIN.encode() + b"model " + b"layer norm " * 200_000,
        PLAIN.rstrip().encode(),
    ],
    ids=["gzip", "bzip2", "utf-16", "bom", "crlf", "cr", "ansi", "latin-1", "huge line", "huge norm line", "no newline"],
)  # fmt: skip
def test_reads_whatever_bytes_tools_leave(tmp_path, content):
    """Compression, encodings, line ends, colours and huge lines change nothing."""
    record = sources.read(write(tmp_path, "a.log", content))
    np.testing.assert_array_equal(record.norms, NORMS)
    np.testing.assert_array_equal(record.steps, TENS)


def test_torn_gzip_keeps_what_came(tmp_path):
    """A compressed log cut in the middle gives its first part, and says so."""
    packed = gzip.compress(("".join(f"step {i} grad_norm {i}.5\n" for i in range(20_000))).encode())
    record = sources.read(write(tmp_path, "a.log.gz", packed[: len(packed) // 2]))
    assert 1000 < len(record) < 20_000
    assert "the compressed file ends early" in record.origin.notes


@pytest.mark.parametrize("cut", ["step 410 grad_norm 0.", "step 410 grad_norm", "step 4"])
def test_a_torn_last_value_is_not_taken(tmp_path, cut):
    """Half a number at the end of a growing log is no value."""
    text = "".join(f"step {s} grad_norm {n:.6f}\n" for s, n in zip(TENS, NORMS, strict=True))
    assert len(sources.read(write(tmp_path, "a.log", text + cut))) == len(NORMS)
    table = "step,grad_norm\n" + "".join(f"{s},{n:.6f}\n" for s, n in zip(TENS, NORMS, strict=True))
    assert len(sources.read(write(tmp_path, "a.csv", table + "410,0."))) == len(NORMS)
    assert len(sources.read(write(tmp_path, "b.csv", table + "41"))) == len(NORMS)


def test_a_training_that_is_still_running_is_doubted(tmp_path):
    """The Trainer's max_steps tells how much of the schedule its log covers."""
    for max_steps, there in ((2000, True), (500, False), (0, False), ("many", False)):
        content = trainer_state(max_steps=max_steps)
        found = suggest(write(tmp_path, "trainer_state.json", content)).doubts
        assert any("ends at step 400 of 2000" in text for text in found) == there


def test_torn_trainer_state_keeps_its_rows(tmp_path):
    """A trainer_state.json cut while it was written gives the rows that are whole."""
    content = trainer_state()
    record = sources.read(write(tmp_path, "trainer_state.json", content[: len(content) * 3 // 4]))
    assert 25 < len(record) < 40
    np.testing.assert_array_equal(record.norms, NORMS[: len(record)])
    assert record.origin.clip_side == "before"


def test_reads_a_stream():
    """Standard input is read like a file, a pipe too."""
    record = sources.read(io.BytesIO(PLAIN.encode()))
    np.testing.assert_array_equal(record.norms, NORMS)
    assert record.origin.path == "standard input"
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(PLAIN.encode())
    with os.fdopen(read_end, "rb") as pipe:
        assert len(sources.read(pipe)) == len(NORMS)


def test_a_file_that_grows_is_read_to_where_it_was(tmp_path):
    """A writer that goes on does not keep the reader from ending."""
    path = write(tmp_path, "a.log", PLAIN * 3000)
    seen = []

    def progress(done, total):
        seen.append((done, total))
        with path.open("ab") as file:
            file.write(PLAIN.encode() * 100)

    size = path.stat().st_size
    sources.read(path, progress=progress)
    assert seen[-1] == (size, size)


def test_memory_stays_bounded(tmp_path):
    """A 30 MB log with few norms is read in little memory."""
    path = tmp_path / "a.log"
    with path.open("wb") as file:
        for i in range(30):
            file.write(b"nothing to see on this line\n" * 37_000 + b"step %d grad_norm 0.5\n" % i)
    code = (
        "import resource, sys\nfrom normtune import sources\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(sources.read(sys.argv[1])) == 30\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 40_000  # kB


@pytest.mark.parametrize("names", [("torch", "optuna", "pandas", "scipy.stats", "matplotlib")])
def test_reading_needs_no_heavy_import(tmp_path, names):
    """A log is read without torch, optuna, pandas, scipy.stats and matplotlib."""
    path = write(tmp_path, "trainer_state.json", trainer_state())
    code = f"import sys\nfrom normtune import sources\nsources.read(sys.argv[1])\nprint([n for n in {names!r} if n in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
