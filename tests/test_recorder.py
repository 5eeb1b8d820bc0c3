"""`NormRecorder`: what the user holds, on good days and bad ones."""

import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import loops
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import early_bound
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normtune
from normtune.errors import RecordError
from normtune.recorder import NormRecorder
from normtune.records import NormRecord
from normtune.suggestion import suggest


def train(recorder_of, *, clip=None, steps=loops.STEPS, model=None, optimizer=None):
    """A plain loop; its recorder, still open, and the true norms."""
    model = model or loops.net()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = recorder_of(optimizer)
    true = []
    for x, y in loops.batches(steps):
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        true.append(loops.true_norm(model.parameters()))
        if clip is not None:
            early_bound(model.parameters(), clip)
        optimizer.step()
    return recorder, true


# --- what the user calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, loops.CLIP])
def test_memory_and_file_give_the_same_record(tmp_path, clip):
    """With a path or without, the norms are those of the loop."""
    kept, true = train(NormRecorder, clip=clip)
    path = tmp_path / "deep" / "run.norms.jsonl"
    written, _ = train(lambda o: NormRecorder(o, path, flush_every=5), clip=clip)
    np.testing.assert_allclose(kept.record.norms, true, rtol=1e-5)
    np.testing.assert_array_equal(written.record.norms, kept.record.norms)
    np.testing.assert_array_equal(written.record.max_norm, kept.record.max_norm)
    assert written.record.current == kept.record.current == clip
    for recorder in (kept, written):
        recorder.close()
        assert len(recorder.record) == loops.STEPS
    np.testing.assert_array_equal(NormRecord.load(path).norms, kept.record.norms)


def test_the_header_says_what_the_norms_belong_to(tmp_path):
    """Optimizer, rate, sizes, versions and the user's own facts."""
    path = tmp_path / "x.norms.jsonl"
    recorder, _ = train(lambda o: NormRecorder(o, path, metadata={"batch": 16, "x": math.nan}))
    recorder.close()
    facts = NormRecord.load(path).metadata
    assert facts["optimizer"] == "SGD"
    assert facts["lr_initial"] == 0.05
    assert (facts["parameters"], facts["tensors"]) == (74, 4)
    assert (facts["norm_type"], facts["dtype"], facts["by"]) == (2.0, "float32", "step")
    assert facts["torch"] == torch.__version__
    assert facts["metadata"] == {"batch": 16, "x": "nan"}


def test_a_recorder_that_nobody_holds_records_all_the_same(tmp_path):
    """One line is added to a loop, and no name is needed for what it makes."""
    path = tmp_path / "x.norms.jsonl"
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    NormRecorder(optimizer, path)
    gc.collect()
    _, true = train(lambda _: None, model=model, optimizer=optimizer)
    del optimizer, model
    gc.collect()
    np.testing.assert_allclose(NormRecord.load(path).norms, true, rtol=1e-5)


def test_a_context_manager_closes(tmp_path):
    """Also when the loop raises."""
    path = tmp_path / "x.norms.jsonl"
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loop():
        with NormRecorder(optimizer, path):
            train(lambda _: None, model=model, optimizer=optimizer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert len(NormRecord.load(path)) == loops.STEPS
    train(lambda _: None, model=model, optimizer=optimizer)
    assert len(NormRecord.load(path)) == loops.STEPS


def test_max_norm_can_be_set_while_training():
    """It holds from the next step on, and the record says where it changed."""
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = NormRecorder(optimizer)
    wanted = [None, None, 0.1, 0.1, math.inf, 0.2, None]
    for limit, (x, y) in zip(wanted, loops.batches(len(wanted)), strict=True):
        recorder.max_norm = limit
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        early_bound(model.parameters(), loops.CLIP)
        optimizer.step()
    expected = [loops.CLIP if limit is None else limit for limit in wanted]
    assert recorder.record.max_norm.tolist() == expected
    recorder.close()


def test_suggest_is_suggest_of_the_record():
    """With its options."""
    recorder, true = train(NormRecorder, steps=60)
    assert recorder.suggest().max_norm == suggest(np.array(true)).max_norm
    assert recorder.suggest(rule="p50").rule == suggest(np.array(true), rule="p50").rule
    recorder.close()


def test_a_recorder_without_a_step_says_so():
    """No empty record."""
    recorder = NormRecorder(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(RecordError, match="holds no step"):
        _ = recorder.record
    recorder.close()
    recorder.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 0}, "max_norm must be a number above 0"),
        ({"max_norm": -1.0}, "max_norm must be a number above 0"),
        ({"max_norm": math.nan}, "max_norm must be a number above 0"),
        ({"max_norm": True}, "max_norm must be a number above 0"),
        ({"max_norm": "1.0"}, "max_norm must be a number above 0"),
        ({"measure": "forward"}, 'measure must be "step" or "backward"'),
        ({"norm_type": 0}, "norm_type must be a number above 0"),
        ({"flush_every": 0}, "flush_every must be a whole number"),
        ({"flush_every": 2.5}, "flush_every must be a whole number"),
        ({"groups": "layers"}, "groups must be a module"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, options, reason):
    """What was asked and what came (row 50)."""
    path = tmp_path / "x.norms.jsonl"
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=reason):
        NormRecorder(optimizer, path, **options)
    assert not path.exists()
    with NormRecorder(optimizer) as recorder, pytest.raises(ValueError, match="max_norm must"):
        recorder.max_norm = 0.0


@pytest.mark.parametrize("target", [3, "model", [], {}, [1, 2], object()])
def test_what_is_no_optimizer_is_refused(target):
    """With what to pass instead."""
    with pytest.raises(ValueError, match=r"pass what your loop calls \.step"):
        NormRecorder(target)


# --- imposing --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from([None, 1e-4, 0.37, 1e4]))
def test_an_imposed_max_norm_equals_torchs_clip_at_it(max_norm, clip):
    """Bit for bit, whether the loop itself would clip lower, higher or not at all."""

    def parameters(recorder_of, clip):
        model = loops.net()
        recorder, _ = train(recorder_of, clip=clip, model=model)
        if recorder is not None:
            recorder.close()
        return list(model.parameters())

    ours = parameters(lambda o: NormRecorder(o, max_norm=max_norm), clip)
    theirs = parameters(lambda _: None, max_norm)
    assert all(map(torch.equal, ours, theirs))


def test_200_steps_with_a_recorder_are_bit_identical():
    """Parameters and random state, with a file, groups and short flushes (row 63)."""

    def run(tmp):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        recorder = tmp and NormRecorder(optimizer, groups=model, flush_every=7)
        for x, y in loops.batches(200):
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            early_bound(model.parameters(), 1.0)
            optimizer.step()
        if recorder:
            recorder.close()
        return [*model.parameters(), torch.get_rng_state()]

    assert all(map(torch.equal, run(tmp=True), run(tmp=False)))


# --- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, loops.CLIP])
@pytest.mark.parametrize("how", ["module", "named_parameters", "mapping", "param_groups"])
def test_groups_hold_torchs_norm_of_each_group(how, clip):
    """Per parameter, or over the parameters of a name, before clipping; kept to six digits."""
    model = loops.net()
    sets = [{"params": model[0].parameters(), "name": "first"}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(sets, lr=0.05)
    groups = {
        "module": model,
        "named_parameters": model.named_parameters(),
        "mapping": {"first": model[0], "last bias": model[2].bias},
        "param_groups": "param_groups",
    }[how]
    members = {
        "mapping": {
            "first": [*model[0].parameters()],
            "last bias": [model[2].bias],
            "other": [model[2].weight],
        },
        "param_groups": {"first": [*model[0].parameters()], "group 1": [*model[2].parameters()]},
    }.get(how, {name: [p] for name, p in model.named_parameters()})
    recorder = NormRecorder(optimizer, groups=groups)
    expected = {name: [] for name in members}
    for x, y in loops.batches():
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        for name, parameters in members.items():
            expected[name].append(float(nn.utils.get_total_norm([p.grad for p in parameters])))
        if clip is not None:
            early_bound(model.parameters(), clip)
        optimizer.step()
    found = recorder.record
    recorder.close()
    assert set(found.groups) == set(members)
    for name, norms in expected.items():
        np.testing.assert_allclose(found.groups[name], norms, rtol=6e-6)
    squares = sum(np.square(norms) for norms in found.groups.values())
    np.testing.assert_allclose(np.sqrt(squares), found.norms, rtol=1e-5)


# --- norms from elsewhere --------------------------------------------------------------------------


def test_an_engine_can_record_the_norm_it_knows():
    """Numbers and tensors, through the recorder or through the module (rows 4, 17b)."""
    recorder = NormRecorder(None)
    for norm in (1, 2.5, torch.tensor(3.0), torch.tensor(4.0, requires_grad=True)):
        normtune.record_norm(norm)
    recorder.record_norm(np.float32(5.0))
    assert recorder.record.norms.tolist() == [1.0, 2.5, 3.0, 4.0, 5.0]
    assert recorder.record.metadata["by"] == "given"
    with NormRecorder(None), pytest.raises(ValueError, match="found 2"):
        normtune.record_norm(1.0)
    recorder.close()
    with pytest.raises(ValueError, match="found 0"):
        normtune.record_norm(1.0)


def test_measure_backward_without_an_optimizer_has_a_row_for_each_backward():
    """For a loop that neither clips nor steps by anything of torch's (row 4)."""
    model = loops.net()
    recorder = NormRecorder(model, measure="backward")
    true = []
    for x, y in loops.batches():
        model.zero_grad()
        loops.loss_of(model, x, y).backward()
        true.append(loops.true_norm(model.parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad.mul_(0.01))
    np.testing.assert_allclose(recorder.record.norms, true, rtol=1e-5)
    recorder.close()


@pytest.mark.parametrize("clip", [None, 5.0])
def test_measure_backward_imposes_right_before_the_step(clip):
    """Bit for bit torch's clip at it, with and without a clip call of the loop's own."""

    def parameters(recorder_of, clip):
        model = loops.net()
        recorder, true = train(recorder_of, clip=clip, model=model)
        if recorder is not None:
            recorder.close()
            np.testing.assert_allclose(recorder.record.norms, true, rtol=1e-5)
            assert set(recorder.record.max_norm) == {0.21}
        return list(model.parameters())

    ours = parameters(lambda o: NormRecorder(o, measure="backward", max_norm=0.21), clip)
    assert all(map(torch.equal, ours, parameters(lambda _: None, 0.21)))


def test_copies_whose_gradients_are_assigned_give_no_suggestion():
    """Masters and shards, as DeepSpeed keeps them: the finding names what to call (row 17b)."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    recorder = NormRecorder(optimizer)
    for i in range(40):
        parameter.grad = torch.full((3,), 1.0 + i)
        optimizer.step()
    finding = next(f for f in recorder.findings if f.kind == "unknown-gradients")
    assert finding.blocks
    assert "engine.get_global_grad_norm()" in finding.text
    with pytest.raises(normtune.NormtuneError, match="no backward pass"):
        recorder.suggest()
    recorder.close()


def test_steps_inside_a_cuda_graph_are_told_and_give_no_suggestion():
    """What is captured cannot be read; the record says what is missing (row 67)."""
    recorder, _ = train(NormRecorder, steps=60)
    recorder._report("graph-capture", "")
    with pytest.raises(normtune.NormtuneError, match="CUDA graph"):
        recorder.suggest()
    recorder.close()


# --- flushes and device reads ----------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what waits for a device, for tensors that are not on the CPU, or for all."""

    def __init__(self, *, cpu=False):
        super().__init__()
        self.cpu, self.count = cpu, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += self.cpu or args[0].device.type != "cpu"
        return func(*args, **(kwargs or {}))


def test_the_counter_of_reads_can_count():
    """One .item() is one read; and on the meta device it raises."""
    with Reads(cpu=True) as reads:
        torch.ones(3).sum().item()
    assert reads.count == 1
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device="meta").sum().item()


def two_part_clip(model):
    total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, total)


def no_clip(model):
    pass


def one_clip(model):
    early_bound(model.parameters(), 1.0)


META_LOOPS = {
    "plain": ({}, no_clip),
    "clip": ({}, one_clip),
    "clip, no foreach": ({}, lambda m: early_bound(m.parameters(), 1.0, foreach=False)),
    "value": ({}, lambda m: nn.utils.clip_grad_value_(m.parameters(), 1.0)),
    "two-part clip": ({}, two_part_clip),
    "imposed": ({"max_norm": 0.5}, no_clip),
    "imposed on a clip": ({"max_norm": 0.5}, one_clip),
    "measured only": ({"max_norm": math.inf}, one_clip),
    "groups": ({"groups": "param_groups"}, one_clip),
    "backward": ({"measure": "backward"}, no_clip),
    "scaled rate": ({"lr_factor": 0.5}, no_clip),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", META_LOOPS.values(), ids=META_LOOPS)
def test_no_step_reads_a_device_and_each_flush_reads_it_once(case, dtype):
    """On the meta device a read raises: 9 steps pass, and the flush of the 10th fails (row 68)."""
    options, clip = case
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).to(device="meta", dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = NormRecorder(optimizer, flush_every=10, **options)

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 6, device="meta", dtype=dtype)).sum().backward()
        clip(model)
        optimizer.step()

    with Reads() as reads:
        for _ in range(9):
            recorder._flushed_at = time.monotonic()  # a slow machine must not flush by time
            step()
    assert reads.count == 0
    assert recorder.n_steps == len(recorder._buffer.waiting) == 9
    # The recorder is alive and would read: without max_norm it gives up with a warning.
    imposes = "max_norm" in options or "lr_factor" in options
    told = pytest.raises(RuntimeError) if imposes else pytest.warns(UserWarning, match="meta")
    with told:
        step()
    recorder._buffer.drop()
    recorder.close()


def test_a_flush_reads_all_waiting_values_in_one_go(monkeypatch):
    """One copy to the host for each device, however many steps and groups wait (row 68)."""
    from normtune import buffer

    recorder, _ = train(lambda o: NormRecorder(o, groups="param_groups"))
    asked = []
    to_host = buffer._to_host
    monkeypatch.setattr(buffer, "_to_host", lambda t: asked.append(len(t)) or to_host(t))
    assert len(recorder.record) == loops.STEPS
    assert len(asked) == 1
    assert asked[0] >= loops.STEPS
    recorder.close()


def test_values_of_several_devices_are_read_device_by_device():
    """One flat tensor each, put back in order (row 34)."""
    from normtune.buffer import _to_host

    class OneCopy(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.moved = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.moved += func is torch.ops.aten.cat.default
            return func(*args, **(kwargs or {}))

    values = [torch.tensor(1.0), torch.tensor([2.0, 3.0]), torch.tensor(4.0).double()]
    assert _to_host(values) == [[1.0], [2.0, 3.0], [4.0]]
    with OneCopy() as copies, pytest.raises(RuntimeError, match="meta"):
        _to_host([v.to("meta") for v in values])
    assert copies.moved == 1


def test_rows_are_written_after_so_many_steps_and_after_two_seconds(tmp_path):
    """Whichever comes first (row 36)."""
    path = tmp_path / "x.norms.jsonl"
    recorder, optimizer, parameter = children.watched(path, flush_every=10)
    children.hand_made_steps(optimizer, parameter, 9)
    with pytest.raises(RecordError, match="holds no step"):
        NormRecord.load(path)
    children.hand_made_steps(optimizer, parameter, 1)
    assert len(NormRecord.load(path)) == 10
    children.hand_made_steps(optimizer, parameter, 3)
    assert len(NormRecord.load(path)) == 10
    recorder._flushed_at -= 2.1
    children.hand_made_steps(optimizer, parameter, 1)
    assert len(NormRecord.load(path)) == 14
    recorder.close()


def test_memory_does_not_grow_with_the_number_of_steps(tmp_path):
    """What a recorder holds after 3000 steps is what it held after 300."""
    import pickle

    recorder, optimizer, parameter = children.watched(tmp_path / "x.norms.jsonl", flush_every=50)

    def held():
        pairing, buffer = recorder._pairing, recorder._buffer
        parts = (pairing.events, pairing._series, pairing._stepped, pairing._ids, buffer.waiting)
        return [*map(len, parts), len(pickle.dumps(buffer._written)), len(recorder._findings)]

    children.hand_made_steps(optimizer, parameter, 300)
    early = held()
    children.hand_made_steps(optimizer, parameter, 2700)
    assert held() == early
    recorder.close()


# --- restarts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_file", [True, False])
def test_state_dict_continues_the_record(tmp_path, in_file):
    """Through torch.save, as in a checkpoint; steps count on, findings and metadata stay."""
    path = tmp_path / "x.norms.jsonl" if in_file else None
    checkpoint = tmp_path / "checkpoint.pt"
    true, starts = [], []
    for start in range(3):
        model = loops.net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = NormRecorder(optimizer, path)
        if start:
            recorder.load_state_dict(torch.load(checkpoint, weights_only=True))
        starts.append(recorder.n_steps)
        for x, y in loops.batches(4):
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            true.append(loops.true_norm(model.parameters()))
            (nn.utils.clip_grad_value_ if start == 0 else early_bound)(model.parameters(), 1e3)
            optimizer.step()
        torch.save(recorder.state_dict(), checkpoint)
        record = recorder.record
        recorder.close()
    assert starts == [0, 4, 8]
    assert "clip-by-value" in {f.kind for f in record.findings}
    assert record.steps.tolist() == list(range(1, 13))
    np.testing.assert_allclose(record.norms, true, rtol=1e-5)


@pytest.mark.parametrize("in_file", [True, False])
def test_a_restart_from_an_older_checkpoint_repeats_steps(tmp_path, in_file):
    """The later attempt counts (row 76)."""
    path = tmp_path / "x.norms.jsonl" if in_file else None
    recorder, optimizer, parameter = children.watched(path)
    children.hand_made_steps(optimizer, parameter, 5)
    state = recorder.state_dict()
    children.hand_made_steps(optimizer, parameter, 3, 6)
    recorder.close()
    recorder, optimizer, parameter = children.watched(path)
    recorder.load_state_dict(state)
    children.hand_made_steps(optimizer, parameter, 5, 106)
    record = recorder.record
    recorder.close()
    assert record.norms.tolist() == [1, 2, 3, 4, 5, 106, 107, 108, 109, 110]
    assert record.steps.tolist() == list(range(1, 11))


def test_resume_counts_on_in_every_series(tmp_path):
    """From the file alone; without resume a second start stands alone (row 76)."""
    path = tmp_path / "x.norms.jsonl"

    def start(*, resume):
        model = loops.net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = NormRecorder(optimizer, path, resume=resume)
        for x, y in loops.batches(4):
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            early_bound(model[0].parameters(), 1.0)
            early_bound(model[2].parameters(), 1.0)
            optimizer.step()
        recorder.close()

    for resume in (True, True, True):
        start(resume=resume)
    record = NormRecord.load(path)
    other = next(n.split("'")[1] for n in record.origin.notes if n.startswith("also series"))
    for series in (record.series, other):
        assert NormRecord.load(path, series=series).steps.tolist() == list(range(1, 13))
    start(resume=False)
    assert NormRecord.load(path).steps.tolist() == [1, 2, 3, 4]


def test_resume_of_a_file_that_is_not_there_begins_one(tmp_path):
    """And a file that is something else is left alone."""
    recorder, optimizer, parameter = children.watched(tmp_path / "x.norms.jsonl", resume=True)
    children.hand_made_steps(optimizer, parameter, 2)
    recorder.close()
    assert recorder.record.steps.tolist() == [1, 2]
    (tmp_path / "train.py").write_text("import torch\n", encoding="utf-8")
    with pytest.raises(RecordError, match="no normtune record"):
        children.watched(tmp_path / "train.py", resume=True)


def test_a_series_that_is_new_after_a_restart_begins_where_the_attempt_begins(tmp_path):
    """A clip call whose line moved goes on counting, and does not overwrite early steps."""
    path = tmp_path / "x.norms.jsonl"
    for _ in range(2):
        model = loops.net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = NormRecorder(optimizer, path, resume=True)
        first = not recorder.n_steps
        for x, y in loops.batches(5):
            optimizer.zero_grad()
            loops.loss_of(model, x, y).backward()
            if first:
                early_bound(model.parameters(), 1.0)
            else:
                early_bound(model.parameters(), 1.0)
            optimizer.step()
        recorder.close()
    assert recorder.record.steps.tolist() in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    other = next(n.split("'")[1] for n in recorder.record.origin.notes if "also series" in n)
    steps = [recorder.record.steps[0], NormRecord.load(path, series=other).steps[0]]
    assert sorted(steps) == [1, 6]


# --- processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Children from a server that has torch loaded and no thread started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "normtune.recorder", "children"])
    return context


def run(processes, function, *args):
    process = processes.Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def test_sigkill_costs_at_most_the_steps_since_the_last_flush(tmp_path, processes):
    """At any moment, and the file is whole (row 70)."""
    random = np.random.default_rng(7)
    for turn in range(4):
        path, told = tmp_path / f"{turn}.norms.jsonl", processes.Value("l", 0)
        process = processes.Process(target=children.train_until_killed, args=(path, told))
        process.start()
        until = time.monotonic() + 60
        while told.value == 0 and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        record = NormRecord.load(path)
        assert len(record) >= told.value > 0
        np.testing.assert_array_equal(record.norms, np.arange(1.0, len(record) + 1))
        assert not any("torn" in note for note in record.origin.notes)


def test_a_program_that_ends_without_close_loses_nothing(tmp_path):
    """However it ends, but for signals and os._exit (row 36)."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import children; children.end_in_every_way({str(tmp_path)!r})"],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
    )
    codes = dict(line.split() for line in done.stdout.splitlines())
    assert set(codes) == set(children.ENDINGS)
    assert codes["end"] == codes["unheld"] == "0"
    assert codes["sys.exit"] == "3"
    assert codes["exception"] != "0"
    for how in children.ENDINGS:
        assert len(NormRecord.load(tmp_path / f"{how}.norms.jsonl")) == 7, how


def test_a_forked_child_has_a_file_of_its_own(tmp_path, processes):
    """No row is written twice or lost, and a child that does not train writes nothing (row 37)."""
    path = tmp_path / "x.norms.jsonl"
    assert run(processes, children.fork_while_recording, path) == 0
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert NormRecord.load(path).norms.tolist() == [1, 2, 3, 4, 5, 6, 7]
    child = NormRecord.load(next(f for f in files if f != path))
    assert child.norms.tolist() == [101, 102, 103, 104]


def test_a_full_disk_ends_no_training_and_loses_no_row(tmp_path, processes):
    """One warning; what waited is written when there is room (row 71)."""
    path = tmp_path / "x.norms.jsonl"
    assert run(processes, children.train_on_a_filling_disk, path) == 0
    assert NormRecord.load(path).norms.tolist() == list(range(1, 51))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_disk_that_stays_full_is_told_twice_and_raises_nothing():
    """Once while training and once at close() (rows 20, 71)."""
    recorder, optimizer, parameter = children.watched("/dev/full", flush_every=5)
    with pytest.warns(UserWarning, match="cannot write its record for now") as caught:
        children.hand_made_steps(optimizer, parameter, 20)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="could not write all of the record") as caught:
        recorder.close()
    assert len(caught) == 1


def test_a_live_record_can_be_read_at_any_moment(tmp_path, processes):
    """All steps that were told, and only whole ones (row 78)."""
    path, told = tmp_path / "x.norms.jsonl", processes.Value("l", 0)
    process = processes.Process(target=children.train_slowly, args=(path, told))
    process.start()
    lengths = []
    while process.is_alive():
        at_least = told.value
        if at_least:
            record = NormRecord.load(path)
            np.testing.assert_array_equal(record.norms, np.arange(1.0, len(record) + 1))
            assert len(record) >= at_least
            lengths.append(len(record))
    process.join()
    assert process.exitcode == 0
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path):
    """Before the training, not after it."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RecordError, match="cannot write the record"):
        children.watched(tmp_path / "file" / "x.norms.jsonl")


# --- half precision, mixed and odd -----------------------------------------------------------------


def test_norms_of_bf16_clips_are_not_quantised():
    """The loop gets torch's three digits, the record fp32's (row 44)."""
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    recorder = NormRecorder(optimizer)
    generator = torch.Generator().manual_seed(0)
    returned, true = set(), []
    for _ in range(100):
        optimizer.zero_grad()
        weights = torch.randn(1000, generator=generator).bfloat16()
        (parameter * weights).sum().backward()
        true.append(loops.true_norm([parameter]))
        returned.add(float(early_bound([parameter], 1.0)))
        optimizer.step()
    np.testing.assert_allclose(recorder.record.norms, true, rtol=1e-5)
    assert len(returned) < 30
    assert len(set(recorder.record.norms)) > 90
    recorder.close()


def test_mixed_dtypes_with_an_overflowing_half():
    """fp16 beside fp32 in one clip call: the record has the true norm (rows 43, 60)."""
    half = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    full = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([half, full], lr=0.0)
    recorder = NormRecorder(optimizer)
    ((half * 50000.0).sum().float() + (full * 3.0).sum()).backward()
    true = loops.true_norm([half, full])
    assert early_bound([half, full], 1.0).isinf()
    optimizer.step()
    assert recorder.record.norms[0] == pytest.approx(true, rel=1e-6)
    recorder.close()


@pytest.mark.parametrize("p", [1.0, 3.0, math.inf])
def test_the_norm_type_of_a_clip_call_is_kept(p):
    """In the record and in the suggestion's own unit (row 57)."""
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = NormRecorder(optimizer)
    true = []
    for x, y in loops.batches():
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        true.append(loops.true_norm(model.parameters(), p))
        early_bound(model.parameters(), 1.0, norm_type=p)
        optimizer.step()
    np.testing.assert_allclose(recorder.record.norms, true, rtol=1e-5)
    assert float(recorder.record.metadata["norm_type"]) == p
    recorder.close()
