"""Where the validation values of a command are found, and what is said where there are none."""

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import source_samples

import normtune
from normtune.metrics import Metric, MetricError, in_file, in_output, quoted
from normtune.tasks import Task

EXAMPLE = "val loss ([0-9.]+)"


def values_in(tmp_path, output, pattern=EXAMPLE):
    (tmp_path / "output.txt").write_text(output)
    return [value for _, value in in_output(tmp_path / "output.txt", pattern)]


@pytest.mark.parametrize(
    ("line", "pattern", "expected"),
    [
        ("val loss 1.5, again val loss 1.25", EXAMPLE, [1.5, 1.25]),
        ("val loss 1.5e-05", EXAMPLE, [1.5e-5]),
        ("val loss 2.5E+3 at step 7", EXAMPLE, [2500.0]),
        ("the val loss is now 0.25.", "val loss is now ([0-9.]+)", [0.25]),
        ("acc: 97.5%", r"acc: (\S+)", [97.5]),
        ("{'eval_loss': 1.25, 'epoch': 3}", "'eval_loss': ([^,]+)", [1.25]),
        ("\x1b[32mval loss\x1b[0m 3.5", EXAMPLE, [3.5]),
        ("10%|# val loss 3.5\r20%|## val loss 2.5\r", EXAMPLE, [3.5, 2.5]),
        ("reward -12", r"reward (-?\d+)", [-12.0]),
        ("train loss 1.5", EXAMPLE, []),
        ("saved to val loss", EXAMPLE, []),
    ],
)
def test_a_pattern_finds_its_numbers(tmp_path, line, pattern, expected):
    """Each match is a value, whole with its exponent, through colours and progress bars."""
    assert values_in(tmp_path, line + "\n", pattern) == expected


@pytest.mark.parametrize("word", ["nan", "NaN", "inf", "-inf", "Infinity"])
@pytest.mark.parametrize("pattern", [EXAMPLE, r"val loss (\d+\.\d{4})\b", r"val loss +(\S+)"])
def test_a_pattern_for_digits_finds_what_is_not_finite(tmp_path, word, pattern):
    """Row 80: [0-9.]+ does not match nan, and the last finite value would pass for the result."""
    found = values_in(tmp_path, f"val loss 1.2345\nval loss {word}\n", pattern)
    assert found[0] == 1.2345
    assert len(found) == 2
    assert not math.isfinite(found[1])


def test_a_word_that_only_looks_like_nan_is_none(tmp_path):
    """Names such as nano and info, and a nan somewhere else in the line."""
    assert values_in(tmp_path, "nano val loss info\nval loss 2.5 lr nan\n") == [2.5]


def test_what_is_no_number_is_quoted(tmp_path):
    """A pattern that takes too much is told what it took."""
    with pytest.raises(MetricError, match=r"found 'good', which is no number"):
        values_in(tmp_path, "val loss good\n", r"val loss (\w+)")


HISTORY = {
    "log_history": [
        {"loss": 3.0, "step": 10},
        {"eval_loss": 2.5, "step": 10},
        {"eval_loss": 2.0, "step": 20},
    ]
}
CSV = "epoch,step,train_loss,val_loss\n0,9,1.5,\n0,9,,0.75\n1,19,,0.5\n"
LINES = "".join(json.dumps({"step": i, "val_loss": 1.0 / i}) + "\n" for i in (1, 2, 4))

FILES = {
    "trainer_state.json": (json.dumps(HISTORY), "eval_loss", [(10, 2.5), (20, 2.0)]),
    "eval_results.json": ('{"epoch": 3.0, "eval_loss": 1.25}', "eval_loss", [1.25]),
    "beside lists": ('{"val_loss": 0.5, "train": [3.0, 2.0]}', "val_loss", [0.5]),
    "nested.json": ('{"results": {"eval": {"loss": 0.5}}}', "results/eval/loss", [0.5]),
    "a list of values": ('{"val": [3, 2, 1]}', "val", [3.0, 2.0, 1.0]),
    "NaN": ('{"val": [3, NaN]}', "val", [3.0, math.nan]),
    "metrics.jsonl": (LINES, "val_loss", [(1, 1.0), (2, 0.5), (4, 0.25)]),
    "metrics.csv": (CSV, "val_loss", [(9, 0.75), (19, 0.5)]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "key", "expected"), FILES.values(), ids=FILES)
def test_a_key_of_a_file_gives_its_values(tmp_path, text, key, expected):
    """JSON, JSON Lines and CSV as trainings write them."""
    file = tmp_path / ("log.csv" if text is CSV else "log.jsonl" if text is LINES else "log.json")
    file.write_text(text)
    steps = [e if isinstance(e, tuple) else (i, e) for i, e in enumerate(expected, 1)]
    found = in_file(file, key)
    assert [s for s, _ in found] == [s for s, _ in steps]
    np.testing.assert_array_equal([v for _, v in found], [v for _, v in steps])


def test_a_tag_of_a_tensorboard_folder_gives_its_values(tmp_path):
    """The newest events below the folder, whatever the version folder is called."""
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    data = source_samples.events(["val/loss", "train/loss"], steps=[1, 2], norms=[3.0, 2.5])
    (folder / "events.out.tfevents.1700000000.host.1.0").write_bytes(data)
    assert [v for _, v in in_file(tmp_path / "logs", "val/loss")] == [3.0, 2.5]
    newest = tmp_path / "logs" / "version_*" / "events*"
    assert [v for _, v in in_file(newest, "val/loss")] == [3.0, 2.5]


def test_a_missing_file_or_key_is_told_what_there_is(tmp_path):
    """The names beside it, and the keys inside."""
    (tmp_path / "log.csv").write_text(CSV)
    with pytest.raises(MetricError, match=r"wrote no .*state\.json; .* holds log\.csv"):
        in_file(tmp_path / "state.json", "loss")
    with pytest.raises(MetricError, match=r"holds no 'eval_loss'; it holds .*val_loss"):
        in_file(tmp_path / "log.csv", "eval_loss")
    (tmp_path / "two.csv").write_text("a/loss,b/loss,step\n1,2,3\n1,2,4\n")
    with pytest.raises(MetricError, match="several values named 'loss': a/loss, b/loss"):
        in_file(tmp_path / "two.csv", "loss")


# --- of a run ----------------------------------------------------------------------------------


def metric_of(tmp_path, **how):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    return Metric(Task(folder, "", tmp_path, seed=0, **how), folder)


def test_the_values_of_a_run_come_from_its_own_folder(tmp_path):
    """{run_dir} stands for it, and a relative path starts at the study file."""
    for where in ("{run_dir}/m.json", "m.json"):
        metric = metric_of(tmp_path, metric_file=f"{where}:a")
        file = tmp_path / "run" / "m.json" if "{" in where else tmp_path / "m.json"
        file.write_text('{"a": 2}')
        assert metric.values() == [(1, 2.0)]


def test_a_file_of_an_earlier_run_does_not_count(tmp_path):
    """A run that writes nothing is told so; one that appends has the values that it appended."""
    file = tmp_path / "m.csv"
    file.write_text("step,loss\n1,3\n2,2\n")
    metric = metric_of(tmp_path, metric_file="m.csv:loss")
    with pytest.raises(MetricError, match="was not written by this run"):
        metric.values()
    time.sleep(0.01)
    with file.open("a") as lines:
        lines.write("1,5\n")
    assert metric.values() == [(1, 5.0)]


def test_a_value_that_is_not_finite_counts_only_at_the_end(tmp_path):
    """A best value that starts as inf is no divergence, a last one that is nan is."""
    metric = metric_of(tmp_path, metric=EXAMPLE)
    output = tmp_path / "run" / "output.txt"
    output.write_text("val loss inf\nval loss 2.5\nval loss 1.5\n")
    assert [v for _, v in metric.values()] == [2.5, 1.5]
    output.write_text("val loss 2.5\nval loss nan\nval loss nan\n")
    (_, first), (_, last) = metric.values()
    assert first == 2.5
    assert math.isnan(last)


def test_report_metric_tells_the_run_and_does_nothing_elsewhere(tmp_path, monkeypatch):
    """The public function: numbers and tensors of one element, from the first rank only."""
    import torch

    normtune.report_metric("anything, outside of a run")
    monkeypatch.setenv("NORMTUNE_RUN", str(tmp_path / "run"))
    metric = metric_of(tmp_path, metric="report_metric")
    normtune.report_metric(3, step=10)
    normtune.report_metric(torch.tensor([2.5]), step=20)
    monkeypatch.setenv("RANK", "1")
    normtune.report_metric(7.0)
    assert metric.values() == [(10, 3.0), (20, 2.5)]
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="as one number but got 'good'"):
        normtune.report_metric("good")


def test_a_metric_that_never_appears_quotes_the_output(tmp_path):
    """The lines that share a word with the pattern, else the last ones, without control codes."""
    output = tmp_path / "run" / "output.txt"
    metric = metric_of(tmp_path, metric=EXAMPLE)
    with pytest.raises(MetricError, match="never appeared in the output; it printed nothing"):
        metric.values()
    output.write_text("valid loss: 1.5\n" + "bye\x1b]0;x\x07\n" * 9)
    with pytest.raises(MetricError, match=r'its output has "valid loss: 1\.5"$'):
        metric.values()
    assert "\x07" not in quoted(output)
    told = metric_of(tmp_path, metric="report_metric")
    with pytest.raises(MetricError, match=r"never called normtune\.report_metric\(value\); its"):
        told.values()


def test_a_report_outside_of_torch_is_cheap(tmp_path):
    """A script that imports normtune for report_metric alone does not wait for torch."""
    import subprocess
    import sys

    probe = "import normtune, sys; normtune.report_metric(1.5); print('torch' in sys.modules)"
    env = {**os.environ, "NORMTUNE_RUN": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", probe], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "False\n", done.stderr
    assert json.loads(Path(tmp_path / "metric.jsonl").read_text())["value"] == 1.5
