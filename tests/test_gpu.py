"""What `studies/gpu.py` measures, as tests; they need a GPU that torch can use."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

import gpu


@pytest.mark.parametrize("precision", gpu.precisions())
@pytest.mark.parametrize("name", gpu.optimizers())
@pytest.mark.parametrize("clip", [float("inf"), 0.3])
def test_norms_are_true_and_parameters_bit_identical(name, precision, clip):
    """Fused, foreach and capturable, in every precision; an imposed max_norm is torch's clip."""
    rows = gpu.compared(gpu.optimizers()[name], precision, clip)
    assert rows["steps"] == 30
    assert rows["largest relative error"] < 1e-5
    assert rows["parameters bit-identical"]
    assert rows.get("imposed equals torch's clip, bit for bit", True)
    assert not rows["findings"]


def test_the_host_never_waits_for_the_gpu_between_flushes():
    """As many waits with a recorder as without one, and none where the loop has none."""
    rows = gpu.syncs()
    assert any(row["plain"] == 0 for row in rows.values())
    assert all(row["recorded"] <= row["plain"] for row in rows.values())


def test_a_graph_of_the_model_keeps_the_steps_visible_and_one_of_the_step_is_named():
    """Hooks run at capture only, so a record of such a run carries no suggestion."""
    rows = gpu.graphs()
    hidden = rows.pop("whole step in a graph")
    assert "CUDA graph" in hidden["refused"]
    assert hidden["parameters move at replay"]
    assert all(row["largest relative error"] < 1e-5 for row in rows.values())


def test_ddp_and_fsdp2_on_nccl_give_the_norm_of_the_whole_model():
    """With a single rank, which shows hooks, streams and DTensors."""
    for row in gpu.wrapped().values():
        assert row["steps"] == row["true steps"]
        assert row["largest relative error"] < 1e-5
