"""Two ranks: the norm of the whole model, one file, and nobody waits for ever."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from frameworks_table import holds

from normtune import ranks

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="needs torch.distributed with gloo",
    ),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both ranks saw in every case of scripts/sharded.py, run once."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [sys.executable, str(Path(__file__).parent / "scripts" / "sharded.py"), str(folder)]
    processes = [
        subprocess.Popen(
            script,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def reference():
    """The norms of one process that sees the batches of both ranks: clipped, and not."""
    import sharded

    def train(clip):
        model = sharded.net()
        optimizer = sharded.sgd(model)
        norms = []
        for x, y in sharded.batches():
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            grads = torch.cat([p.grad.flatten() for p in model.parameters()])
            norms.append(grads.double().norm().item())
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), sharded.CLIP)
            optimizer.step()
        return norms

    return {"with": train(True), "without": train(False)}


WHOLE = {
    "ddp_with_clip": ("with", "DDP, clip"),
    "ddp_without_clip": ("without", "DDP, no clipping"),
    "fsdp2_with_clip": ("with", "FSDP2, clip"),
    "fsdp2_without_clip": ("without", "FSDP2, no clipping"),
    "fsdp1_with_its_own_clip": ("with", "FSDP1, its own clip_grad_norm_"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_each_rank_has_the_norm_of_the_whole_model(case, seen, reference):
    """Equal to one process with all batches; empty shards are no trouble; nothing is changed."""
    clip, row = WHOLE[case]
    for rank in seen:
        np.testing.assert_allclose(rank[case]["norms"], reference[clip], rtol=1e-4)
        holds(row, rank[case]["norms"], reference[clip])
        assert rank[case]["same"]
        assert rank[case]["findings"] == []


@pytest.mark.parametrize("case", WHOLE)
def test_rank_0_alone_writes_the_file(case, seen):
    """The ranks agree, so one record serves."""
    assert seen[0][case]["files"] == ["run.norms.jsonl"]


def test_accumulation_in_no_sync_gives_the_norm_of_the_reduced_sum(seen):
    """The local gradients of the first micro-batch are no norm of any step."""
    for rank in seen:
        result = rank["ddp_accumulating"]
        np.testing.assert_allclose(result["norms"], result["true"], rtol=1e-5)
        holds("DDP, accumulation in no_sync()", result["norms"], result["true"])
        assert result["findings"] == []
    assert seen[0]["ddp_accumulating"]["norms"] == seen[1]["ddp_accumulating"]["norms"]


MIXED = {
    "mixed_without_clip": "DTensor over two meshes and plain parameters",
    "mixed_with_one_norm_for_each_mesh": "the same, one norm given to a clip call for each mesh",
    "mixed_with_a_rank_that_lacks_gradients": "the same, one rank without some gradients",
}


@pytest.mark.parametrize("case", MIXED)
def test_plain_replicated_and_sharded_parameters_count_once_each(case, seen):
    """Over two meshes, where torch's own clip_grad_norm_ refuses; one total given twice is one."""
    for rank in seen:
        np.testing.assert_allclose(rank[case]["norms"], rank[case]["true"], rtol=1e-5)
        holds(MIXED[case], rank[case]["norms"], rank[case]["true"])


def test_an_imposed_max_norm_clips_shards_as_torch_does(seen):
    """In place of the loop's own clip, and before the step where the loop has none."""
    for rank in seen:
        assert rank["fsdp2_imposed"]["instead"] == rank["fsdp2_imposed"]["asked"]
        assert rank["fsdp2_imposed"]["added"] == rank["fsdp2_imposed"]["asked"]
        assert rank["fsdp1_imposed"]["imposed"] == rank["fsdp1_imposed"]["asked"]
        assert rank["fsdp1_imposed"]["free"] == rank["fsdp1_imposed"]["never"]


def test_an_imposed_max_norm_clips_a_mix_that_torch_refuses(seen):
    """By the factor of the norm over all meshes."""
    for rank in seen:
        own, hand = rank["mixed_imposed"]["own"], rank["mixed_imposed"]["hand"]
        for a, b in zip(own, hand, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_fsdp1_without_its_clip_call_is_not_recorded(seen):
    """Each rank has only its shard, so there is a reason in place of a wrong number."""
    for rank in seen:
        assert rank["fsdp1_without_clip"]["steps"] == 0
        assert rank["fsdp1_without_clip"]["findings"] == ["fsdp1-shards"]


def test_a_recorder_on_rank_0_alone_lets_the_training_go_on(seen):
    """It does not wait for a rank that never comes, says so, and changes nothing."""
    result = seen[0]["recorder_on_rank_0_only"]
    assert len(result["said"]) == 1
    assert "each rank of a sharded training must make its NormRecorder" in result["said"][0]
    assert result["same"]
    assert result["seconds"] < 20


def test_a_recorder_on_rank_0_alone_has_the_norm_of_the_loops_own_clip(seen, reference):
    """The clip call has reduced it over the ranks already."""
    norms = seen[0]["recorder_on_rank_0_only_with_clip"]["norms"]
    np.testing.assert_allclose(norms, reference["with"], rtol=1e-4)


def test_a_recorder_that_one_rank_closes_ends_on_the_others(seen):
    """The other rank stops recording at once, with the reason, and its training goes on."""
    assert seen[0]["rank_0_closes_early"]["steps"] == 5
    assert seen[1]["rank_0_closes_early"]["steps"] == 6  # rank 0 helped with one norm more
    assert "of another rank was closed" in seen[1]["rank_0_closes_early"]["said"][0]


def test_a_sharded_norm_that_an_engine_knows_is_a_number_of_the_whole_model(seen, reference):
    """A DTensor is converted before it is kept, shown or written (row 24)."""
    for rank in seen:
        result = rank["a_norm_that_an_engine_knows"]
        assert result["kinds"] == ["DTensor"]
        np.testing.assert_allclose(result["norms"], reference["without"], rtol=1e-4)
        assert "12 steps" in result["said"]


BROKEN = {  # the rank, and how many steps are recorded there and on the other
    "a_store_that_fails_on_rank_1": (1, 6, 7),
    "a_hook_that_fails_on_rank_0": (0, 5, 7),
    "a_norm_that_fails_on_rank_1": (1, 5, 7),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_recorder_that_breaks_on_one_rank_makes_no_rank_wait(case, seen):
    """It does its part of the norm that the other waits for; both stop, and the training goes on."""
    rank, own, other = BROKEN[case]
    broken, whole = seen[rank][case], seen[1 - rank][case]
    assert broken["same"]
    assert whole["same"]
    assert broken["said"] == ["normtune stopped recording, training goes on (ValueError: broken)"]
    assert "the recorder of another rank was closed" in whole["said"][0]
    assert (broken["steps"], whole["steps"]) == (own, other)


def test_ranks_that_train_by_themselves_have_a_record_each_and_a_finding(seen):
    """Their first norms differ, so rank 0 does not speak for rank 1."""
    findings = [finding for rank in seen for finding in rank["ranks_of_their_own"]["findings"]]
    assert set(findings) == {"ranks-differ"}  # of the slower rank at least
    files = seen[0]["ranks_of_their_own"]["files"]
    assert files == ["run.norms.jsonl", "run.rank1.norms.jsonl"]
    assert seen[0]["ranks_of_their_own"]["norms"] != seen[1]["ranks_of_their_own"]["norms"]


def test_a_single_process_has_nothing_to_settle(monkeypatch):
    """Without a process group there is rank 0 of 1, and a launcher's variables are believed."""
    alone = ranks.Ranks()
    alone.meet()
    assert (alone.rank, alone.size, alone.grouped) == (0, 1, False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (ranks.rank(), ranks.size()) == (3, 4)
