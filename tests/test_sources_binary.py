"""Event files and W&B files are read as the tools that write them read them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from source_samples import NORMS, TENS, events, field, scalar_event, tfrecord, wandb_file

from normtune import sources


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def test_reads_what_torch_writes(tmp_path):
    """Scalars of torch's SummaryWriter, in both of its styles, are those that tensorboard reads."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    for step, norm in zip(TENS, NORMS, strict=True):
        writer.add_scalar("train/grad_norm", norm, step, new_style=step % 20 == 0)
        writer.add_scalar("double", norm, step, double_precision=True, new_style=True)
        writer.add_histogram("weights", np.array([1.0, 2.0, 3.0]), step)
    writer.add_scalar("train/grad_norm", float("nan"), 1000)
    writer.close()
    oracle = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "scalars": 0})
    oracle.Reload()
    read = {e.step: e.value for e in oracle.Scalars("train/grad_norm")}
    for event in (
        oracle.Tensors("train/grad_norm") if "train/grad_norm" in oracle.Tags()["tensors"] else []
    ):
        read[event.step] = float(np.atleast_1d(event.tensor_proto.float_val)[0])
    record = sources.read(tmp_path)
    assert set(read) <= set(record.steps.tolist())
    for step, norm in zip(record.steps[:-1].tolist(), record.norms[:-1].tolist(), strict=True):
        assert norm == np.float32(NORMS[TENS.index(step)])
    assert np.isnan(record.norms[-1])
    double = sources.read(tmp_path, key="double").norms
    np.testing.assert_array_equal(double, NORMS)


@pytest.mark.parametrize(
    ("kind", "content", "value"),
    [
        (1, field(4, struct.pack("<f", 0.5)), 0.5),
        (2, field(4, struct.pack("<d", 0.1)), 0.1),
        (19, field(4, struct.pack("<e", 0.25)), 0.25),
        (14, field(4, struct.pack("<H", 0x3F00)), 0.5),
        (3, field(4, struct.pack("<i", 7)), 7.0),
        (1, field(5, struct.pack("<f", 0.75)), 0.75),
        (2, field(6, struct.pack("<d", 0.3)), 0.3),
        (9, field(10, b"\x05"), 5.0),
    ],
)
def test_reads_every_scalar_tensor(tmp_path, kind, content, value):
    """A scalar tensor of any number type, packed or as bytes."""
    tensor = field(8, field(1, kind) + content)
    event = tfrecord(field(2, 3) + field(5, field(1, field(1, b"grad_norm") + tensor)))
    record = sources.read(write(tmp_path, "e.tfevents", events(["loss"]) + event))
    assert (record.norms.tolist(), record.steps.tolist()) == ([value], [3])


def test_a_torn_event_file_keeps_what_came(tmp_path):
    """An event file cut at any byte gives its whole records."""
    content = events(["grad_norm"])
    for cut in range(len(content) - 40, len(content)):
        record = sources.read(write(tmp_path, "e.tfevents", content[:cut]))
        assert len(record) == len(NORMS) - 1
        assert "1 torn line skipped" in record.origin.notes


def test_large_events_do_not_matter(tmp_path):
    """An image of several megabytes between two scalars is passed over."""
    image = tfrecord(field(5, field(1, field(1, b"image") + field(4, bytes(5_000_000)))))
    content = events(["grad_norm"]) + image + scalar_event(500, "grad_norm", 9.0)
    assert sources.read(write(tmp_path, "e.tfevents", content)).norms[-1] == 9.0


@pytest.mark.parametrize("pad", [0, 10, 32_740, 32_760, 100_000])
def test_wandb_records_cross_blocks(tmp_path, pad):
    """Records of any length, over one block or several, come whole."""
    rows = [
        {"grad_norm": n, "pad": "x" * pad, "_step": s} for s, n in zip(TENS, NORMS, strict=True)
    ]
    record = sources.read(write(tmp_path, "run.wandb", wandb_file(rows, {})))
    np.testing.assert_array_equal(record.norms, NORMS)
    np.testing.assert_array_equal(record.steps, TENS)


def test_a_damaged_wandb_block_costs_itself(tmp_path):
    """A flipped byte is noticed by the checksum; later blocks are read."""
    rows = [
        {"grad_norm": n, "pad": "x" * 5000, "_step": s} for s, n in zip(TENS, NORMS, strict=True)
    ]
    content = bytearray(wandb_file(rows, {}))
    content[40_000] ^= 0xFF
    record = sources.read(write(tmp_path, "run.wandb", bytes(content)))
    assert 20 < len(record) < len(NORMS)
    assert record.norms[-1] == NORMS[-1]
    assert any("torn" in note for note in record.origin.notes)
