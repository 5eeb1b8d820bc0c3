"""`make bench`: what the recorder costs, as ratios of two things timed in turn in one run.

Floors first. Measuring a norm reads every gradient once (4 bytes a parameter). torch's clip reads
once for the norm, then reads and writes for the multiplication, even by 1.0: three passes. So a
clip that skips that multiplication can cost a third of torch's where memory is the limit, and a
recorder in a loop without clipping costs one pass of reading, against about six floating-point
operations a parameter and sample for forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normtune import listening
from normtune.backwards import Backwards
from normtune.recorder import NormRecorder

# Parameters -> layers of an MLP and samples a step.
SHAPES = {
    "10 k": ([64, 128, 10], 64),
    "1 M": ([256, 1024, 704, 16], 128),
    "10 M": ([512, 2048, 2560, 1408, 16], 256),
    "100 M": ([1024, 6144, 6144, 6144, 2560, 16], 256),
}
OURS = {"torch", "torch again", "normtune", "norm"}
RESULTS = Path(__file__).parent / "results" / "bench.json"


def model_of(sizes: list[int]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def seconds(function: Callable[[], object], at_least: float) -> float:
    """Seconds of one call, from as many calls as fill the time."""
    n, spent = 1, 0.0
    while True:
        start = time.perf_counter()
        for _ in range(n):
            function()
        spent = time.perf_counter() - start
        if spent >= at_least or n >= 1 << 20:
            return spent / n
        n = max(n + 1, math.ceil(1.2 * n * at_least / max(spent, 1e-9)))


def in_turn(functions: dict[str, Callable[[], object]], rounds: int, at_least: float) -> Any:
    """The median time of each, measured round by round so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, at_least))
    return {name: statistics.median(values) for name, values in times.items()}


# --- clipping ----------------------------------------------------------------------------------


def clipping(name: str, rounds: int) -> dict[str, float]:
    """One clip call against torch's and the rivals', on fresh gradients as a loop has them."""
    sizes, _ = SHAPES[name]
    model = model_of(sizes)
    parameters = list(model.parameters())
    kept = [torch.randn_like(p) * 1e-3 for p in parameters]
    norm = float(nn.utils.get_total_norm(kept))
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    clip = nn.utils.clip_grad_norm_
    with NormRecorder(optimizer) as recorder:
        contenders = {
            "torch": lambda c: unwatched(clip, parameters, c),
            "torch again": lambda c: unwatched(clip, parameters, c),
            "normtune": lambda c: recorder.clip_grad_norm_(parameters, c),
            "norm": lambda _: norm_alone(parameters),
            **rivals(model, parameters),
        }
        calls = max(20, rounds * 300 // (1 + sum(p.numel() for p in parameters) // 100_000))
        free = single_calls(contenders, 10 * norm, kept, optimizer, calls)
        for rival in set(contenders) - OURS:
            del contenders[rival]
        bound = single_calls(contenders, 0.5 * norm, kept, optimizer, calls)
    found = {
        "not clipped / torch": free["normtune"] / free["torch"],
        "floor (the norm alone) / torch": free["norm"] / free["torch"],
        "clipped / torch": bound["normtune"] / bound["torch"],
        "null (torch / torch)": free["torch again"] / free["torch"],
        "us of torch": 1e6 * free["torch"],
    }
    for rival in sorted(set(free) - OURS):
        found[f"not clipped / {rival}"] = free["normtune"] / free[rival]
    return found


def single_calls(
    contenders: dict[str, Callable[[float], object]],
    max_norm: float,
    kept: list[Tensor],
    optimizer: torch.optim.Optimizer,
    calls: int,
) -> dict[str, float]:
    """The median time of a call of each, in turn; new gradients and a step between the calls."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    parameters = optimizer.param_groups[0]["params"]
    order = random.Random(0)  # noqa: S311  who runs after whom decides what is in the caches
    for _ in range(calls):
        for name in order.sample(list(contenders), len(contenders)):
            contender = contenders[name]
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad.clone()
            start = time.perf_counter()
            contender(max_norm)
            times[name].append(time.perf_counter() - start)
            optimizer.step()
    return {name: statistics.median(values) for name, values in times.items()}


def norm_alone(parameters: list[Tensor]) -> Tensor:
    """What torch's clip itself computes of the norm, and nothing around it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads, 2.0)
    return torch.linalg.vector_norm(torch.stack(norms), 2.0)


def unwatched(function: Callable[..., object], parameters: list[Tensor], max_norm: float) -> object:
    """The function of torch as it runs in a process that has no recorder."""
    spied, listening.owners = listening.owners, {}
    try:
        return function(parameters, max_norm)
    finally:
        listening.owners = spied


def rivals(model: nn.Module, parameters: list[Tensor]) -> dict[str, Callable[[float], object]]:
    """AutoClip's variant and ZClip as their users call them, where they are installed."""
    found: dict[str, Callable[[float], object]] = {}
    try:
        from autoclip.torch import QuantileClip

        clipper = QuantileClip(parameters, quantile=0.9, history_length=1000, global_threshold=True)
        found["autoclip"] = lambda _: clipper.step()
    except ImportError:
        print("autoclip is not installed: left out")
    try:
        from zclip import ZClip

        z = ZClip(max_grad_norm=None)
        found["zclip"] = lambda _: z.step(model)
    except ImportError:
        print("zclip is not installed: left out")
    return found


# --- hooks -------------------------------------------------------------------------------------


class Clock:
    """Adds up the time spent inside normtune's hooks."""

    def __init__(self) -> None:
        self.spent = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added up."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - start

        return wrapper

    @contextlib.contextmanager
    def on_backward_hooks(self) -> Iterator[None]:
        """Recorders that are made meanwhile have their backward hooks timed."""
        kept = Backwards.saw
        Backwards.saw = self.timed(kept)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Backwards.saw = kept  # type: ignore[method-assign]


def hooks_of_torch() -> list[dict[int, Any]]:
    optimizer = sys.modules["torch.optim.optimizer"]
    return [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]


def overhead(name: str, rounds: int, *, clip: bool) -> dict[str, float]:
    """Own time in hooks over step time, and whole loops against each other with their null."""
    sizes, samples = SHAPES[name]
    x = torch.randn(samples, sizes[0])
    y = torch.randint(0, sizes[-1], (samples,))

    def loop_of(*, recorded: bool) -> tuple[Callable[[], None], NormRecorder | None]:
        model = model_of(sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        recorder = NormRecorder(optimizer, Path(folder) / "a.norms.jsonl") if recorded else None

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return step, recorder

    with tempfile.TemporaryDirectory() as folder:
        plain, _ = loop_of(recorded=False)
        again, _ = loop_of(recorded=False)
        clock = Clock()
        with clock.on_backward_hooks():
            watched, recorder = loop_of(recorded=True)
        for step in (plain, again, watched):
            step()
        loops = in_turn({"plain": plain, "again": again, "watched": watched}, rounds, 0.2)
        share, empty = own_share(watched, clock, rounds)
        assert recorder is not None
        recorder.close()
    return {
        "hooks / step": share,
        "null (two empty hooks / step)": empty,
        "loop / plain loop": loops["watched"] / loops["plain"],
        "null (plain / plain)": loops["again"] / loops["plain"],
        "ms a step": 1e3 * loops["plain"],
    }


def own_share(step: Callable[[], None], clock: Clock, rounds: int) -> tuple[float, float]:
    """Seconds inside the hooks over seconds of the loop; the same of hooks that do nothing.

    The median of several stretches: what else the machine does hits some of them.
    """
    kept = [dict(hooks) for hooks in hooks_of_torch()]
    nothing = Clock()
    for hooks in hooks_of_torch():
        for key, hook in list(hooks.items()):
            hooks[key] = clock.timed(hook)
        hooks[-1] = nothing.timed(lambda *_: None)
    shares, empty = [], []
    for _ in range(rounds):
        clock.spent = nothing.spent = 0.0
        start = time.perf_counter()
        n = 0
        while time.perf_counter() - start < 0.3 or n == 0:
            step()
            n += 1
        total = time.perf_counter() - start
        shares.append(clock.spent / total)
        empty.append(nothing.spent / total)
    for hooks, old in zip(hooks_of_torch(), kept, strict=True):
        hooks.clear()
        hooks.update(old)
    return statistics.median(shares), statistics.median(empty)


# --- device reads ------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the operations that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count and go on."""
        if "_local_scalar_dense" in str(function):
            self.count += 1
        return function(*args, **(kwargs or {}))


def reads_per_step() -> dict[str, float]:
    """Steps on the meta device, where any read raises, and host reads counted on the CPU."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    recorder = NormRecorder(optimizer, flush_every=10_000)
    recorder._flushed_at = math.inf
    steps = 50
    with Reads() as reads:
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    kept = len(recorder._buffer.waiting)
    recorder._buffer.waiting.clear()
    recorder.close()
    return {"steps kept": kept / steps, "reads a step": reads.count / steps}


# --- memory, start, files ----------------------------------------------------------------------


def memory_growth() -> dict[str, float]:
    """Bytes that a recorder keeps per further step when it writes to a file."""
    with tempfile.TemporaryDirectory() as folder:
        p = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([p], lr=0.0)
        recorder = NormRecorder(optimizer, Path(folder) / "m.norms.jsonl")

        def steps(n: int) -> None:
            for _ in range(n):
                p.grad = torch.ones(4)
                optimizer.step()

        steps(2_000)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        steps(10_000)
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        recorder.close()
    return {"bytes kept a step": (after - before) / 10_000}


def start_up(rounds: int) -> dict[str, float]:
    """`normtune --help` and `normtune suggest LOG` against ``python -c "import pandas"``."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        rng = np.random.default_rng(0)
        norms = rng.lognormal(size=500)
        log.write_text("step,grad_norm\n" + "\n".join(f"{i},{x}" for i, x in enumerate(norms)))
        commands = {
            "pandas": [sys.executable, "-c", "import pandas"],
            "help": [sys.executable, "-m", "normtune", "--help"],
            "suggest": [sys.executable, "-m", "normtune", "suggest", str(log)],
        }
        timed = in_turn(
            {
                name: lambda c=command: subprocess.run(c, check=True, capture_output=True)  # type: ignore[misc]
                for name, command in commands.items()
            },
            rounds,
            0.0,
        )
    return {
        "--help / import pandas": timed["help"] / timed["pandas"],
        "suggest LOG / import pandas": timed["suggest"] / timed["pandas"],
    }


def reading(rounds: int) -> dict[str, float]:
    """`suggest` on 1,000,000 recorded steps against ``pandas.read_json(lines=True)``."""
    import pandas as pd

    from normtune.records import RecordWriter, dumps, header, row
    from normtune.suggestion import suggest

    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=1_000_000).astype(np.float32).astype(float).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.norms.jsonl"
        writer = RecordWriter(path)
        writer.write([dumps(header(optimizer="SGD", lr=0.1))])
        writer.write([row(i + 1, norm) for i, norm in enumerate(norms)])
        writer.close()
        timed = in_turn(
            {
                "normtune": lambda: suggest(path),
                "pandas": lambda: pd.read_json(path, lines=True),
            },
            rounds,
            0.0,
        )
    return {
        "suggest / pandas.read_json": timed["normtune"] / timed["pandas"],
        "seconds of suggest": timed["normtune"],
    }


def logs(rounds: int) -> dict[str, float]:
    """Logs of other tools with 1,000,000 lines against pandas, or against plain line reading."""
    import pandas as pd

    from normtune import sources

    norms = np.random.default_rng(0).lognormal(size=1_000_000).tolist()

    def lines_of(path: Path) -> int:
        with path.open("rb") as file:
            return sum(1 for _ in file)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csv, jsonl, text = folder / "log.csv", folder / "log.jsonl", folder / "train.log"
        csv.write_text(
            "step,loss,grad_norm\n" + "".join(f"{i},2.5,{x}\n" for i, x in enumerate(norms))
        )
        rows = (f'{{"step": {i}, "loss": 2.5, "grad_norm": {x}}}\n' for i, x in enumerate(norms))
        jsonl.write_text("".join(rows))
        text.write_text(
            "".join(
                f"step {i} | loss: 2.5000 | norm: {x:.4f} | dt: 1.2ms\n"
                for i, x in enumerate(norms)
            )
        )
        timed = in_turn(
            {
                "csv": lambda: sources.read(csv),
                "pandas csv": lambda: pd.read_csv(csv),
                "jsonl": lambda: sources.read(jsonl),
                "pandas jsonl": lambda: pd.read_json(jsonl, lines=True),
                "text": lambda: sources.read(text),
                "lines": lambda: lines_of(text),
            },
            rounds,
            0.0,
        )
    return {
        "CSV / pandas.read_csv": timed["csv"] / timed["pandas csv"],
        "JSONL / pandas.read_json": timed["jsonl"] / timed["pandas jsonl"],
        "text / reading its lines": timed["text"] / timed["lines"],
        "seconds of the text": timed["text"],
    }


# --- all of it ---------------------------------------------------------------------------------

TARGETS = {
    "not clipped / torch": "at most 0.60",
    "clipped / torch": "at most 1.02 (1.15 at 10 k)",
    "hooks / step": "at most 0.02 from 10 M up, 0.10 at 10 k",
    "not clipped / autoclip": "below 1",
    "not clipped / zclip": "below 1",
    "reads a step": "0",
    "bytes kept a step": "about 0",
    "--help / import pandas": "at most 2",
    "suggest LOG / import pandas": "at most 2",
    "suggest / pandas.read_json": "at most 0.5",
}


def show(title: str, rows: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in sorted(rows.items()):
        target = TARGETS.get(name, "")
        print(f"  {name:<32} {value:8.3f}   {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": args.threads,
            "rounds": args.rounds,
        }
    }
    for name in args.sizes:
        rounds = args.rounds if name != "100 M" else min(args.rounds, 3)
        rows = {f"clip, {name} parameters": clipping(name, rounds)}
        rows[f"loop without clipping (AdamW), {name}"] = overhead(name, rounds, clip=False)
        rows[f"loop with clip_grad_norm_ (AdamW), {name}"] = overhead(name, rounds, clip=True)
        for title, values in rows.items():
            found[title] = values
            show(title, values)
    for title, function in {
        "device reads": reads_per_step,
        "memory": memory_growth,
        "start": lambda: start_up(args.rounds),
        "reading 1,000,000 steps": lambda: reading(min(args.rounds, 3)),
        "logs of 1,000,000 lines": lambda: logs(min(args.rounds, 2)),
    }.items():
        found[title] = function()
        show(title, found[title])
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
