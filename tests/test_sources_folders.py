"""`normtune.sources` finds the best source in a folder and says what else there is."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from source_samples import NORMS, TENS, events, trainer_state, wandb_file

from normtune import sources
from normtune.errors import RecordError
from normtune.records import RecordWriter, header, row

OTHER = [norm + 100 for norm in NORMS]
TEXT = "".join(f"step {s} grad_norm {n}\n" for s, n in zip(TENS, OTHER, strict=True))


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lightning(norms):
    head = "epoch,grad_norm,step\n"
    return head + "".join(f"0,{n},{s}\n" for s, n in zip(TENS, norms, strict=True))


def metric(norms):
    return "".join(f"17000000{s:05d} {n} {s}\n" for s, n in zip(TENS, norms, strict=True))


def taken(folder, **options):
    record = sources.read(folder, **options)
    return os.path.relpath(record.origin.path, folder), record


def test_takes_the_state_of_the_finished_run(tmp_path):
    """The trainer_state.json above the checkpoints, which holds the whole run."""
    write(tmp_path, "checkpoint-200/trainer_state.json", trainer_state(OTHER[:20], TENS[:20]))
    write(tmp_path, "trainer_state.json", trainer_state())
    write(tmp_path, "train.log", TEXT)
    name, record = taken(tmp_path)
    assert name == "trainer_state.json"
    np.testing.assert_array_equal(record.norms, NORMS)
    assert any(
        "not read: checkpoint-200/trainer_state.json, train.log" in n for n in record.origin.notes
    )


def test_takes_the_last_checkpoint(tmp_path):
    """Of several checkpoints the one with the highest number, not the last by name."""
    for n in (5, 10, 20):
        write(
            tmp_path,
            f"run/checkpoint-{10 * n}/trainer_state.json",
            trainer_state(NORMS[:n], TENS[:n]),
        )
    write(tmp_path, "run/checkpoint-90/trainer_state.json", trainer_state(NORMS[:9], TENS[:9]))
    name, record = taken(tmp_path)
    assert name == "run/checkpoint-200/trainer_state.json"
    assert len(record) == 20


def test_takes_the_last_lightning_version(tmp_path):
    """lightning_logs/version_10 comes after version_9; its hparams.yaml tells the max_norm."""
    for version in (9, 10):
        write(
            tmp_path,
            f"lightning_logs/version_{version}/metrics.csv",
            lightning(NORMS if version == 10 else OTHER),
        )
        write(
            tmp_path,
            f"lightning_logs/version_{version}/hparams.yaml",
            f"gradient_clip_val: {version}.0\n",
        )
    name, record = taken(tmp_path)
    assert name == "lightning_logs/version_10/metrics.csv"
    assert record.current == 10.0


def test_takes_the_last_wandb_run(tmp_path):
    """The .wandb file of the run that began last."""
    rows = [{"grad_norm": n, "_step": s} for s, n in zip(TENS, NORMS, strict=True)]
    for day, scale in (("20240430_091629-a9", 1), ("20240429_101629-z9", 2)):
        content = wandb_file([r | {"grad_norm": r["grad_norm"] * scale} for r in rows], {})
        write(tmp_path, f"wandb/run-{day}/run-{day[-2:]}.wandb", content)
        write(tmp_path, f"wandb/run-{day}/files/output.log", TEXT)
    (tmp_path / "wandb" / "latest-run").symlink_to("run-20240429_101629-z9")
    name, record = taken(tmp_path)
    assert name == "wandb/run-20240430_091629-a9/run-a9.wandb"
    np.testing.assert_array_equal(record.norms, NORMS)


def test_reads_the_event_files_of_one_run_together(tmp_path):
    """A run that was resumed left several event files: they are one series, in order of time."""
    half = len(NORMS) // 2
    tags = ["train/grad_norm", "train/loss"]
    write(
        tmp_path,
        "runs/a/events.out.tfevents.1700000100.h.1.0",
        events(tags, steps=TENS[half:], norms=NORMS[half:]),
    )
    write(
        tmp_path,
        "runs/a/events.out.tfevents.1700000000.h.1.0",
        events(tags, steps=TENS[:half], norms=NORMS[:half]),
    )
    write(tmp_path, "runs/old/events.out.tfevents.1600000000.h.1.0", events(tags, norms=OTHER))
    _, record = taken(tmp_path)
    np.testing.assert_allclose(record.norms, NORMS, rtol=1e-6)
    np.testing.assert_array_equal(record.steps, TENS)


def test_reads_an_mlflow_store(tmp_path):
    """The metric file with a norm's name, with the run's parameter beside it."""
    run = "mlruns/0/ab12"
    write(tmp_path, f"{run}/metrics/loss", metric(OTHER))
    write(tmp_path, f"{run}/metrics/train/grad_norm", metric(NORMS))
    write(tmp_path, f"{run}/params/max_grad_norm", "0.5")
    name, record = taken(tmp_path)
    assert name == f"{run}/metrics/train/grad_norm"
    assert (record.origin.key, record.current) == ("train/grad_norm", 0.5)
    np.testing.assert_array_equal(record.steps, TENS)
    np.testing.assert_array_equal(sources.read(tmp_path, key="loss").norms, OTHER)


def test_a_record_of_its_own_comes_first(tmp_path):
    """A normtune record is better than any log."""
    write(tmp_path, "trainer_state.json", trainer_state(OTHER))
    writer = RecordWriter(tmp_path / "run.norms.jsonl")
    writer.write([json.dumps(header()), *(row(i + 1, n) for i, n in enumerate(NORMS))])
    writer.close()
    np.testing.assert_array_equal(sources.read(tmp_path).norms, NORMS)


def test_passes_over_files_without_norms(tmp_path):
    """A trainer_log.jsonl, a config and a checkpoint do not hide the log that has norms."""
    write(
        tmp_path, "trainer_log.jsonl", '{"current_steps": 5, "total_steps": 9, "percentage": 1}\n'
    )
    write(tmp_path, "metrics.csv", "step,loss\n1,2\n2,3\n")
    write(tmp_path, "config.json", "{}")
    write(tmp_path, "model.safetensors", bytes(1000))
    write(tmp_path, "logs/train.out", TEXT)
    assert taken(tmp_path)[0] == "logs/train.out"


def test_asks_rather_than_take_the_second_best(tmp_path):
    """Where the best source needs a --key, no worse source is taken silently."""
    both = "step,a/grad_norm,b/grad_norm\n" + "1,2,3\n2,3,4\n" * 30
    write(tmp_path, "metrics.csv", both)
    write(tmp_path, "train.log", TEXT)
    with pytest.raises(RecordError, match="'a/grad_norm', 'b/grad_norm'"):
        sources.read(tmp_path)
    assert {s.path for s in sources.list_series(tmp_path)} == {
        str(tmp_path / n) for n in ("metrics.csv", "train.log")
    }


def test_links_in_circles_end(tmp_path):
    """A link to the folder above, a link to itself and a dangling link are survived."""
    write(tmp_path, "deep/train.log", TEXT)
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "deep" / "self").symlink_to("self")
    (tmp_path / "deep" / "gone.log").symlink_to("nowhere.log")
    assert taken(tmp_path)[0] == "deep/train.log"


def test_says_what_a_folder_lacks(tmp_path):
    """A folder without logs, and one whose logs have no norms, are refused in one line."""
    with pytest.raises(RecordError, match="holds no log that normtune knows"):
        sources.read(tmp_path)
    write(
        tmp_path, "trainer_log.jsonl", '{"current_steps": 5, "total_steps": 9, "percentage": 1}\n'
    )
    write(tmp_path, "a.log", "nothing\n")
    with pytest.raises(
        RecordError, match=r"trainer_state\.json beside it.*1 more source without norms"
    ):
        sources.read(tmp_path)
    assert sources.list_series(tmp_path) == ()
