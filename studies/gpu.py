"""What the recorder does and costs on a GPU: syncs, CUDA graphs, mixed precision, overhead.

Run it where a GPU is; it writes `studies/results/gpu.json`. Floors first: a norm reads every
gradient once (4 bytes a parameter in fp32), the GPU must never be waited for between two flushes,
and a loop that clips has its norm already, so there the recorder may launch nothing at all.

    python studies/gpu.py                    # all of it, minutes
    python studies/gpu.py --only syncs graphs
    NORMTUNE_TEST_DEVICE=cuda python -m pytest tests/test_loops.py    # every kind of loop there
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).parent))

import bench

from normtune.errors import NormtuneError
from normtune.gradients import gradients_of, total_norm
from normtune.recorder import NormRecorder

RESULTS = Path(__file__).parent / "results" / "gpu.json"
DEVICE = "cuda"
# Parameters -> width, blocks, sequences, their length; a transformer with a small vocabulary.
SHAPES = {
    "10 M": (384, 6, 32, 256),
    "100 M": (768, 14, 16, 512),
    "1 B": (2048, 20, 8, 1024),
}
VOCABULARY = 512
FLUSH = 100
FREE = 1e9  # a max_norm that clips nothing
Optimizer = torch.optim.Optimizer
Rows = dict[str, Any]


class Block(nn.Module):
    """A pre-LN transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, max(width // 64, 1), batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sequences of vectors -> the same shape."""
        h = self.first(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.second(x))  # type: ignore[no-any-return]


def transformer(width: int, blocks: int) -> nn.Module:
    torch.manual_seed(0)
    body = [Block(width) for _ in range(blocks)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, width), *body, nn.Linear(width, VOCABULARY))
    return model.to(DEVICE)


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise([64, 256, 256, 10])]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).to(DEVICE)


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(128, 64, generator=generator)
    return x.to(DEVICE), (x[:, :10] * 3).argmax(1).to(DEVICE)


def true_norm(model: nn.Module, scale: float = 1.0) -> float:
    """The plain slow reference: every gradient as fp64 on the host."""
    grads = [
        p.grad.detach().cpu().double().flatten() for p in model.parameters() if p.grad is not None
    ]
    return float(torch.linalg.vector_norm(torch.cat(grads))) / scale


# --- loops ----------------------------------------------------------------------------------------


def optimizers() -> dict[str, Callable[[nn.Module], Optimizer]]:
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    return {
        "SGD": lambda m: sgd(m.parameters(), lr=0.05),
        "SGD fused": lambda m: sgd(m.parameters(), lr=0.05, momentum=0.9, fused=True),
        "AdamW foreach": lambda m: adamw(m.parameters(), lr=1e-3, foreach=True),
        "AdamW fused": lambda m: adamw(m.parameters(), lr=1e-3, fused=True),
        "AdamW capturable, lr a tensor": lambda m: adamw(
            m.parameters(), lr=torch.tensor(1e-3, device=DEVICE), capturable=True, foreach=True
        ),
    }


def precisions() -> tuple[str, ...]:
    return (
        "fp32",
        "bf16 autocast",
        "bf16 parameters",
        "fp16 GradScaler",
        "fp16 GradScaler, unscale_",
    )


class Training:
    """One small training whose steps can be taken one by one."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], precision: str, clip: float) -> None:
        self.model = small()
        self.precision, self.clip = precision, clip
        if precision == "bf16 parameters":
            self.model.to(torch.bfloat16)
        self.optimizer = make(self.model)
        self.scaled = precision.startswith("fp16")
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=self.scaled)  # type: ignore[attr-defined]
        self.clips = clip < math.inf and (not self.scaled or "unscale_" in precision)
        self.true: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy in this precision."""
        half = torch.float16 if self.scaled else torch.bfloat16
        inner = next(self.model.parameters()).dtype
        with torch.autocast(DEVICE, half, enabled=self.scaled or "autocast" in self.precision):
            return nn.functional.cross_entropy(self.model(x.to(inner)).float(), y)

    def step(self, x: Tensor, y: Tensor, *, measure: bool = False) -> None:
        """Backward, clip where the loop clips, step; `measure` waits for the true norm."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(self.loss(x, y)))
        if measure:
            self.true.append(true_norm(self.model, self.scaler.get_scale() if self.scaled else 1.0))
        if self.clips:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def numbers() -> Rows:
    """Recorded norm against the true one, and parameters with and without the recorder."""
    found: Rows = {}
    for name, make in optimizers().items():
        for precision in precisions():
            for clip in (math.inf, 0.3):
                what = f"{name}, {precision}, {'no clipping' if clip == math.inf else 'clips'}"
                found[what] = compared(make, precision, clip)
    return found


def compared(
    make: Callable[[nn.Module], Optimizer], precision: str, clip: float, n: int = 30
) -> Rows:
    alone, watched = Training(make, precision, clip), Training(make, precision, clip)
    with NormRecorder(watched.optimizer) as recorder:
        for i in range(n):
            watched.step(*batch(i), measure=True)
        record = recorder.record
    for i in range(n):
        alone.step(*batch(i))
    true = np.array(watched.true)
    kept = np.isfinite(true) & ~record.skipped
    error = float(np.max(np.abs(record.norms[kept] / true[kept] - 1)))
    rows: Rows = {
        "steps": len(record.norms),
        "largest relative error": error,
        "parameters bit-identical": same(alone.model, watched.model),
        "findings": [f.kind for f in record.findings],
    }
    if alone.clips:
        imposed = Training(make, precision, 7.0)
        with NormRecorder(imposed.optimizer, max_norm=clip):
            for i in range(n):
                imposed.step(*batch(i))
        rows["imposed equals torch's clip, bit for bit"] = same(alone.model, imposed.model)
    return rows


# --- syncs ----------------------------------------------------------------------------------------


def waits(training: Training, n: int = 40) -> int:
    """How often the host waited for the GPU in n steps."""
    data = [batch(i) for i in range(n)]
    for x, y in data[:3]:  # what is made once
        training.step(x, y)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for x, y in data:
            training.step(x, y)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def syncs() -> Rows:
    """Waits of the same steps with and without a recorder; it does not flush meanwhile."""
    found: Rows = {}
    for name, make in optimizers().items():
        for precision in precisions():
            for clip in (math.inf, 0.3):
                for imposed in (None, 0.3):
                    plain = waits(Training(make, precision, clip))
                    training = Training(make, precision, clip)
                    recorder = NormRecorder(training.optimizer, max_norm=imposed, flush_every=10**6)
                    recorder._flushed_at = math.inf  # nor by the clock
                    ours = waits(training)
                    recorder.close()
                    what = f"{name}, {precision}, clip {clip:g}, imposed {imposed}"
                    found[what] = {"steps": 40, "plain": plain, "recorded": ours}
    return found


# --- CUDA graphs and torch.compile ----------------------------------------------------------------


def graphs() -> Rows:
    """Graphs of forward and backward keep the step visible; a graph of the step hides it."""
    return {
        "make_graphed_callables, eager step": graphed_model(),
        "whole step in a graph": whole_step(),
        "torch.compile(mode='reduce-overhead') of the model": compiled(mode="reduce-overhead"),
        "torch.compile of the model, clip and step": compiled(mode="default", everything=True),
    }


def graphed_model() -> Rows:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    graphed = torch.cuda.make_graphed_callables(model, (batch(0)[0].requires_grad_(),))
    with NormRecorder(optimizer) as recorder:
        true = []
        for i in range(30):
            x, y = batch(i)
            optimizer.zero_grad(set_to_none=False)
            nn.functional.cross_entropy(graphed(x), y).backward()
            true.append(true_norm(model))
            clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
        return told(recorder, true)


def told(recorder: NormRecorder, true: list[float]) -> Rows:
    record = recorder.record
    rows: Rows = {"steps": len(record.norms), "true steps": len(true)}
    if len(record.norms) == len(true):
        rows["largest relative error"] = float(np.max(np.abs(record.norms / np.array(true) - 1)))
    rows["findings"] = [f"{f.kind}: {f.text}" for f in record.findings]
    return rows


def whole_step() -> Rows:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    recorder = NormRecorder(optimizer)
    x, y = batch(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = copy.deepcopy(model)
    for _ in range(60):
        graph.replay()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    rows: Rows = {"parameters move at replay": not same(before, model)}
    try:
        rows["suggestion"] = str(recorder.suggest())[:60]
    except (NormtuneError, ValueError) as error:
        rows["refused"] = str(error)
    recorder.close()
    return rows | told(recorder, [])


def compiled(*, mode: str, everything: bool = False) -> Rows:
    torch._dynamo.reset()
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = torch.compile(model, mode=mode)
    recorder = NormRecorder(optimizer)
    step = torch.compile(optimizer.step) if everything else optimizer.step

    def clip() -> Tensor:
        return clip_grad_norm_(list(model.parameters()), 0.3)

    clip_all = torch.compile(clip) if everything else clip
    true = []
    for i in range(30):
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(x), y).backward()
        true.append(true_norm(model))
        clip_all()
        step()
    recorder.close()
    return told(recorder, true)


# --- one rank of NCCL -----------------------------------------------------------------------------


def wrapped() -> Rows:
    """DDP and FSDP2 on NCCL with a single rank: their hooks, streams and DTensors."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    torch.distributed.init_process_group(
        "nccl", rank=0, world_size=1, device_id=torch.device(DEVICE, 0)
    )
    try:
        return {"DDP": parallel(ddp), "FSDP2": parallel(fsdp2)}
    finally:
        torch.distributed.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, device_ids=[0])


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def parallel(wrap: Callable[[nn.Module], nn.Module]) -> Rows:
    model = wrap(small())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with NormRecorder(optimizer) as recorder:
        true = []
        for i in range(30):
            x, y = batch(i)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            whole = [
                getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()
            ]
            true.append(
                float(torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in whole])))
            )
            clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
        return told(recorder, true)


# --- overhead -------------------------------------------------------------------------------------


class Big:
    """A transformer trained in bf16 autocast with AdamW, fused as people run it."""

    def __init__(self, name: str, *, clip: bool) -> None:
        width, blocks, n, length = SHAPES[name]
        self.model = transformer(width, blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.tokens = torch.randint(0, VOCABULARY, (n, length), device=DEVICE)
        self.clip = clip

    def step(self) -> None:
        """Forward, backward, clip where the loop clips, step."""
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = self.model(self.tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.tokens.flatten())
        loss.backward()
        if self.clip:
            clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def milliseconds(function: Callable[[], object], n: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / n


def overhead(rounds: int = 25) -> Rows:
    """Whole loops in turn with a null (the plain loop twice), and the clip call by itself."""
    found: Rows = {}
    for name in SHAPES:
        for clip in (True, False):
            found[f"{name}, {'clips' if clip else 'no clipping'}"] = loops(name, rounds, clip=clip)
        found[f"{name}, the clip call"] = clip_calls(name, rounds)
        torch.cuda.empty_cache()
    return found


def loops(name: str, rounds: int, *, clip: bool) -> Rows:
    """One model: the recorder is attached for its rounds and closed for the others."""
    big = Big(name, clip=clip)
    for _ in range(5):
        big.step()
    n = max(4, round(150 / milliseconds(big.step, 5)))
    times: dict[str, list[float]] = {"plain": [], "again": [], "recorded": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for kind in list(times)[i % 3 :] + list(times)[: i % 3]:
                path = Path(folder) / f"{i}.norms.jsonl"
                times[kind].append(block(big, n, path if kind == "recorded" else None))
        share, gpu = hooks(big, Path(folder) / "hooks.norms.jsonl")
    usual = {kind: float(np.percentile(values, 25)) for kind, values in times.items()}
    memory = [peak(big, recorded=recorded) for recorded in (False, True)]
    return {
        "parameters": numel(list(big.model.parameters())),
        "tensors": len(list(big.model.parameters())),
        "ms a step": usual["plain"],
        "recorded / plain": usual["recorded"] / usual["plain"],
        "null (plain / plain)": usual["again"] / usual["plain"],
        "host time in hooks / step": share,
        "ms on the GPU of one norm / ms a step": 0.0 if clip else gpu / usual["plain"],
        "peak bytes recorded - plain": memory[1] - memory[0],
    }


def block(big: Big, n: int, path: Path | None) -> float:
    """Milliseconds a step over n steps, with a recorder where a path is given."""
    if path is None:
        big.step()
        return milliseconds(big.step, n)
    with NormRecorder(big.optimizer, path, flush_every=FLUSH):
        big.step()
        return milliseconds(big.step, n)


def hooks(big: Big, path: Path) -> tuple[float, float]:
    """Share of a step that the host spends in the hooks, and the GPU's time for one norm."""
    clock = bench.Clock()
    with clock.on_backward_hooks():
        recorder = NormRecorder(big.optimizer, path, flush_every=FLUSH)
    with recorder:
        big.step()
        share = bench.own_share(big.step, clock)
    grads = gradients_of(big.model.parameters())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # the host gets ahead, so that its launches don't count
        start.record()
        total_norm(grads)
        end.record()
        torch.cuda.synchronize()
    return share, start.elapsed_time(end)


def peak(big: Big, *, recorded: bool) -> int:
    recorder = NormRecorder(big.optimizer, flush_every=FLUSH) if recorded else None
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        big.step()
    torch.cuda.synchronize()
    if recorder is not None:
        recorder.close()
    return torch.cuda.max_memory_allocated()


def clip_calls(name: str, rounds: int) -> Rows:
    """`recorder.clip_grad_norm_` and torch's, on gradients that stay, clipped and not."""
    big = Big(name, clip=False)
    big.step()
    parameters: list[Tensor] = list(big.model.parameters())
    recorder = NormRecorder(big.optimizer, flush_every=10**6)
    recorder._flushed_at = math.inf
    contenders: dict[str, Callable[[], object]] = {
        "torch": lambda: bench.unwatched(clip_grad_norm_, parameters, FREE),
        "torch again": lambda: bench.unwatched(clip_grad_norm_, parameters, FREE),
        "recorder": lambda: recorder.clip_grad_norm_(parameters, FREE),
    }
    for rival, call in bench.rivals(big.model, parameters).items():
        contenders[rival] = lambda call=call: call(FREE)  # type: ignore[misc]
    n = max(10, round(40 / milliseconds(contenders["torch"], 5)))
    times: dict[str, list[float]] = {kind: [] for kind in contenders}
    for _ in range(rounds):
        for kind, contender in contenders.items():
            times[kind].append(milliseconds(contender, n))
    recorder.close()
    rows: Rows = {
        f"{kind} / torch": float(np.median(np.array(values) / np.array(times["torch"])))
        for kind, values in times.items()
        if kind != "torch"
    }
    rows["ms of torch"] = statistics.median(times["torch"])
    rows["ms of reading the gradients once at 3 TB/s"] = 1e3 * 4 * numel(parameters) / 3e12
    return rows


def numel(parameters: list[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


# --- all of it ------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], Rows]] = {
    "numbers": numbers,
    "syncs": syncs,
    "graphs": graphs,
    "wrapped": wrapped,
    "overhead": overhead,
}


def environment() -> Rows:
    return {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "flush_every": FLUSH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this script needs one that torch can use")
    kept = json.loads(args.results.read_text()) if args.results.exists() else {}
    found: Rows = {**kept, "environment": environment()}
    for name in args.only:
        found[name] = PARTS[name]()
        print(f"\n{name}\n{json.dumps(found[name], indent=1)}", flush=True)
        args.results.parent.mkdir(exist_ok=True)
        args.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
