"""Kinds of training loop, each with the true norm of every step: the table of docs/loops.md.

Every loop is a function of ``watch`` and ``clip``. It calls ``watch(optimizer)`` once, as a user
would make a recorder, clips at ``clip`` where it clips at all, and returns its model and the true
unclipped norms, computed in fp64 right after ``backward()``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as early_bound
from torch.nn.utils import clip_grads_with_norm_ as early_bound_with_norm

STEPS = 12
DEVICE = os.environ.get("NORMTUNE_TEST_DEVICE", "cpu")  # cuda: the same loops on a GPU
BACKENDS = ("eager", "aot_eager") if DEVICE == "cpu" else ("inductor", "inductor")
CLIP = 0.37

Watch = Callable[..., object]
Loop = Callable[[Watch, float], tuple[nn.Module, list[float]]]


@dataclass(frozen=True)
class Case:
    """A loop and what is expected of its record."""

    name: str
    loop: Loop
    finding: str = ""  # the kind of finding that must be reported
    refused: bool = False  # whether suggest() must refuse
    own_clip: bool = False  # whether the loop clips by torch's clip_grad_norm_ at `clip`
    imposable: bool = True  # whether max_norm=c equals torch's clip at c in this loop
    recorded: bool = True  # whether there is a record at all
    options: tuple[tuple[str, object], ...] = ()
    cpu_only: bool = False  # beyond fp32 norms are taken again in fp64, on the CPU alone


CASES: list[Case] = []


def case(name: str, **expected: object) -> Callable[[Loop], Loop]:
    def add(loop: Loop) -> Loop:
        made = Case(name, loop, **expected)  # type: ignore[arg-type]
        if DEVICE == "cpu" or not made.cpu_only:
            CASES.append(made)
        return loop

    return add


def true_norm(parameters: Iterable[Tensor], p: float = 2.0) -> float:
    """The plain slow reference: every gradient as fp64, in one vector."""
    parts = []
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad.detach()
            grad = grad.to_dense() if grad.is_sparse else grad
            parts.append((grad.abs() if grad.is_complex() else grad).double().flatten())
    return float(torch.linalg.vector_norm(torch.cat(parts), p)) if parts else 0.0


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(DEVICE, dtype)


def batches(n: int = STEPS, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(n, 16, 6, generator=generator).to(DEVICE)
    return [(x.to(dtype), torch.stack([x.sum(1), x[:, 0] * 3], 1).to(dtype)) for x in xs]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((model(x) - y) ** 2).mean()


def simple(
    watch: Watch,
    *,
    clip: Callable[[nn.Module], object] = lambda _: None,
    make: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype = torch.float32,
    p: float = 2.0,
    set_to_none: bool = True,
) -> tuple[nn.Module, list[float]]:
    """A plain loop with one clip call between backward and step."""
    model = net(dtype)
    optimizer = make(model) if make else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch(optimizer)
    true = []
    for x, y in batches(dtype=dtype):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters(), p))
        clip(model)
        optimizer.step()
    return model, true


# --- where the clip call's name comes from ----------------------------------------------------


@case("plain loop, no clipping")
def plain(watch, clip):
    return simple(watch)


@case("clip_grad_norm_ by its full name", own_clip=True)
def late(watch, clip):
    return simple(watch, clip=lambda m: nn.utils.clip_grad_norm_(m.parameters(), clip))


@case("clip_grad_norm_ imported early", own_clip=True)
def early(watch, clip):
    return simple(watch, clip=lambda m: early_bound(m.parameters(), clip))


@case("clip function kept in an attribute", own_clip=True)
def kept(watch, clip):
    class Trainer:
        clip_func = staticmethod(early_bound)

    return simple(watch, clip=lambda m: Trainer().clip_func(m.parameters(), max_norm=clip))


@case("clip_grad_norm, the deprecated name", own_clip=True)
def deprecated(watch, clip):
    import warnings

    def clip_old(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.clip_grad_norm(model.parameters(), clip)

    return simple(watch, clip=clip_old)


@case("get_total_norm, then clip_grads_with_norm_", own_clip=True)
def with_norm(watch, clip):
    def two_calls(model):
        total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, total)

    return simple(watch, clip=two_calls)


@case("clip_grads_with_norm_ imported early", own_clip=True)
def with_norm_early(watch, clip):
    def two_calls(model):
        total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        early_bound_with_norm(model.parameters(), clip, total)

    return simple(watch, clip=two_calls)


@case("one norm given to two clip_grads_with_norm_ calls", own_clip=True)
def shared_norm(watch, clip):
    def two_groups(model):
        parameters = list(model.parameters())
        total = nn.utils.get_total_norm([p.grad for p in parameters])
        early_bound_with_norm(parameters[:2], clip, total)
        early_bound_with_norm(parameters[2:], clip, total)

    return simple(watch, clip=two_groups)


@case("clip with foreach=False", own_clip=True)
def no_foreach(watch, clip):
    return simple(watch, clip=lambda m: early_bound(m.parameters(), clip, foreach=False))


@case("clip by the L1 norm")
def l1(watch, clip):
    return simple(watch, clip=lambda m: early_bound(m.parameters(), clip, norm_type=1.0), p=1.0)


@case("recorder.clip_grad_norm_", own_clip=True)
def own_method(watch, clip):
    recorder = []

    def remember(optimizer):
        recorder.append(watch(optimizer))

    def clip_it(model):
        function = getattr(recorder[0], "clip_grad_norm_", early_bound)
        function(model.parameters(), clip)

    return simple(remember, clip=clip_it)


# --- what stands around the clip call ----------------------------------------------------------


@case("zero_grad(set_to_none=False)", own_clip=True)
def zeroed(watch, clip):
    return simple(watch, clip=lambda m: early_bound(m.parameters(), clip), set_to_none=False)


@case("clip_grad_value_", finding="clip-by-value")
def by_value(watch, clip):
    return simple(watch, clip=lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01))


@case("clip by norm, then by value", finding="clip-by-value", imposable=False)
def norm_then_value(watch, clip):
    def both(model):
        early_bound(model.parameters(), clip)
        nn.utils.clip_grad_value_(model.parameters(), 0.01)

    return simple(watch, clip=both)


@case("clip, then gradients divided", imposable=False)
def divided(watch, clip):
    def divide(model):
        early_bound(model.parameters(), clip)
        for p in model.parameters():
            p.grad.div_(2)

    return simple(watch, clip=divide)


@case("clipped twice at two places", imposable=False)
def twice(watch, clip):
    def both(model):
        early_bound(model.parameters(), 2 * clip)
        early_bound(model.parameters(), clip)

    return simple(watch, clip=both)


@case("clipped twice on one line", imposable=False)
def twice_on_one_line(watch, clip):
    def both(model):
        for _ in range(2):
            early_bound(model.parameters(), clip)

    return simple(watch, clip=both)


@case("clipping switched off by 0 in the script")
def switched_off(watch, clip):
    max_norm = 0.0

    def maybe(model):
        if max_norm > 0:
            early_bound(model.parameters(), max_norm)

    return simple(watch, clip=maybe)


@case("clip_grad_norm_(..., inf) as a measurement", imposable=False)
def measured_by_inf(watch, clip):
    return simple(watch, clip=lambda m: early_bound(m.parameters(), math.inf))


@case("several parameter groups", own_clip=True)
def several_groups(watch, clip):
    def make(model):
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters()}]
        return torch.optim.SGD(groups, lr=0.05)

    return simple(watch, make=make, clip=lambda m: early_bound(m.parameters(), clip))


@case("a parameter without gradient", own_clip=True)
def unused_parameter(watch, clip):
    def make(model):
        model.unused = nn.Parameter(torch.ones(3, device=DEVICE))
        return torch.optim.SGD(model.parameters(), lr=0.05)

    return simple(watch, make=make, clip=lambda m: early_bound(m.parameters(), clip))


@case("parameters added while training", own_clip=True)
def unfrozen(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for i, (x, y) in enumerate(batches()):
        if i == STEPS // 2:
            optimizer.add_param_group({"params": list(model[2].parameters())})
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        mine = [p for g in optimizer.param_groups for p in g["params"]]
        true.append(true_norm(mine))
        early_bound(mine, clip)
        optimizer.step()
        model.zero_grad()
    return model, true


@case("clip on one part of the parameters", imposable=False)
def one_part(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model[0].parameters()))
        early_bound(model[0].parameters(), clip)
        optimizer.step()
    return model, true


@case("two clip calls, one for each part", imposable=False)
def two_parts(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model[0].parameters()))
        early_bound(model[0].parameters(), clip)
        early_bound(model[2].parameters(), 10 * clip)
        optimizer.step()
    return model, true


@case("one clip over two optimizers", own_clip=True)
def two_optimizers(watch, clip):
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.05)
    second = torch.optim.AdamW(model[2].parameters(), lr=0.01)
    watch([first, second])
    true = []
    for x, y in batches():
        model.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        early_bound(model.parameters(), clip)
        first.step()
        second.step()
    return model, true


@case("two optimizers, one of them clipped, the other steps first", imposable=False)
def one_of_two(watch, clip):
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.05)
    second = torch.optim.SGD(model[2].parameters(), lr=0.05)
    watch([first, second])
    true = []
    for x, y in batches():
        model.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model[0].parameters()))
        early_bound(model[0].parameters(), clip)
        second.step()
        first.step()
    return model, true


@case("GAN: two losses, two optimizers", own_clip=True)
def gan(watch, clip):
    torch.manual_seed(3)
    model = nn.ModuleDict({"g": nn.Linear(4, 6), "d": nn.Linear(6, 1)}).to(DEVICE)
    g = torch.optim.Adam(model["g"].parameters(), lr=0.01)
    d = torch.optim.SGD(model["d"].parameters(), lr=0.05)
    watch(d)
    true = []
    for x, _ in batches():
        fake = model["g"](torch.randn(16, 4).to(DEVICE))
        d.zero_grad()
        (model["d"](fake.detach()).mean() - model["d"](x).mean()).backward()
        true.append(true_norm(model["d"].parameters()))
        early_bound(model["d"].parameters(), clip)
        d.step()
        g.zero_grad()
        (-model["d"](fake).mean()).backward()
        g.step()
    return model, true


# --- accumulation and closures ----------------------------------------------------------------


def accumulating(watch, *, after_each, at_end, micro=3):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        for part, target in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (loss_of(model, part, target) / micro).backward()
            after_each(model)
        true.append(true_norm(model.parameters()))
        at_end(model)
        optimizer.step()
    return model, true


@case("accumulation, no clipping")
def accumulation(watch, clip):
    return accumulating(watch, after_each=lambda _: None, at_end=lambda _: None)


@case("accumulation, clip at its end", own_clip=True)
def accumulation_clip(watch, clip):
    return accumulating(
        watch, after_each=lambda _: None, at_end=lambda m: early_bound(m.parameters(), clip)
    )


@case(
    "clip after every micro-batch",
    finding="clip-in-accumulation",
    refused=True,
    imposable=False,
    recorded=False,
)
def clip_each_micro(watch, clip):
    return accumulating(
        watch, after_each=lambda m: early_bound(m.parameters(), clip), at_end=lambda _: None
    )


@case("step(closure)", imposable=False)
def closure(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            true.append(true_norm(model.parameters()))
            return loss

        optimizer.step(evaluate)
    return model, true


@case("step(closure) that clips inside", own_clip=True)
def closure_clip(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            true.append(true_norm(model.parameters()))
            early_bound(model.parameters(), clip)
            return loss

        optimizer.step(closure=evaluate)
    return model, true


@case("LBFGS: ten closures a step", finding="lbfgs", imposable=False)
def lbfgs(watch, clip):
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=4)
    watch(optimizer)
    true = []
    for x, y in batches():
        calls = []

        def evaluate(x=x, y=y, calls=calls):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            calls.append(true_norm(model.parameters()))
            return loss

        optimizer.step(evaluate)
        true.append(calls[0])
    return model, true


# --- mixed precision ---------------------------------------------------------------------------


def scaled(watch, *, fused, unscale, clip, overflow_at=()):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    watch(optimizer)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    true = []
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        if i in overflow_at:
            loss = loss * math.inf
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        norm = true_norm(model.parameters()) / scale
        true.append(norm)
        if unscale:
            scaler.unscale_(optimizer)
        clip(model)
        scaler.step(optimizer)
        scaler.update()
    return model, true


def nothing(model):
    return None


@case("GradScaler, no clipping", imposable=False)
def amp(watch, clip):
    return scaled(watch, fused=False, unscale=False, clip=nothing)


@case("GradScaler, unscale_, clip", own_clip=True)
def amp_clip(watch, clip):
    return scaled(
        watch, fused=False, unscale=True, clip=lambda m: early_bound(m.parameters(), clip)
    )


@case("GradScaler, fused optimizer, no unscale_", imposable=False)
def amp_fused(watch, clip):
    return scaled(watch, fused=True, unscale=False, clip=nothing)


@case("GradScaler, fused optimizer, unscale_, clip", own_clip=True)
def amp_fused_clip(watch, clip):
    return scaled(watch, fused=True, unscale=True, clip=lambda m: early_bound(m.parameters(), clip))


@case("GradScaler skips two steps", imposable=False)
def amp_skips(watch, clip):
    return scaled(watch, fused=False, unscale=False, clip=nothing, overflow_at=(3, 7))


@case("GradScaler skips two steps, fused", imposable=False)
def amp_skips_fused(watch, clip):
    return scaled(watch, fused=True, unscale=False, clip=nothing, overflow_at=(3, 7))


@case("GradScaler skips two steps, with clip", imposable=False)
def amp_skips_clip(watch, clip):
    return scaled(
        watch,
        fused=False,
        unscale=True,
        clip=lambda m: early_bound(m.parameters(), clip),
        overflow_at=(3, 7),
    )


@case(
    "GradScaler, clip without unscale_",
    finding="clip-on-scaled-gradients",
    refused=True,
    imposable=False,
)
def amp_forgot(watch, clip):
    return scaled(
        watch, fused=False, unscale=False, clip=lambda m: early_bound(m.parameters(), clip)
    )


@case(
    "GradScaler, unscale_, clip by own arithmetic, unseen",
    finding="changed-in-place",
    refused=True,
    imposable=False,
    recorded=False,
)
def amp_own_arithmetic(watch, clip):
    return scaled(watch, fused=False, unscale=True, clip=lambda m: by_hand(m, clip))


# --- numbers -----------------------------------------------------------------------------------


@case("bf16 parameters", own_clip=True)
def bf16(watch, clip):
    return simple(watch, dtype=torch.bfloat16, clip=lambda m: early_bound(m.parameters(), clip))


@case("fp16 norm above 65504", finding="half-precision-overflow", imposable=False)
def fp16_overflow(watch, clip):
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16, device=DEVICE))
    model = nn.ParameterList([parameter])
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    watch(optimizer)
    true = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (parameter * 50000.0).sum().backward()
        true.append(true_norm([parameter]))
        early_bound([parameter], clip)
        optimizer.step()
    return model, true


@case("fp32 norm above 1e38", cpu_only=True)
def fp32_overflow(watch, clip):
    return extreme(watch, 1e30)


@case("fp32 norm below 1e-38", cpu_only=True)
def fp32_underflow(watch, clip):
    return extreme(watch, 1e-30)


def extreme(watch, size):
    parameter = nn.Parameter(torch.zeros(10, device=DEVICE))
    model = nn.ParameterList([parameter])
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    watch(optimizer)
    true = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (parameter * size).sum().backward()
        true.append(true_norm([parameter]))
        optimizer.step()
    return model, true


@case("complex and real parameters")
def complex_numbers(watch, clip):
    torch.manual_seed(4)
    a = nn.Parameter(torch.randn(5, dtype=torch.complex64).to(DEVICE))
    b = nn.Parameter(torch.randn(3).to(DEVICE))
    model = nn.ParameterList([a, b])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        ((a.abs() ** 2).sum() + (b**2).sum()).backward()
        true.append(true_norm(model.parameters()))
        optimizer.step()
    return model, true


@case("sparse embedding gradients")
def sparse(watch, clip):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Linear(4, 1)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randint(0, 20, (16,)).to(DEVICE)).pow(2).sum().backward()
        true.append(true_norm(model.parameters()))
        optimizer.step()
    return model, true


@case("non-finite gradients on two steps", imposable=False)
def nonfinite(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch(optimizer)
    true = []
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        factor = {4: math.inf, 8: math.nan}.get(i, 1.0)
        (loss_of(model, x, y) * factor).backward()
        true.append(true_norm(model.parameters()))
        optimizer.step()
    return model, true


@case("create_graph=True")
def double_backward(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        x = x.clone().requires_grad_()  # noqa: PLW2901
        loss = loss_of(model, x, y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.pow(2).sum()).backward()
        true.append(true_norm(model.parameters()))
        optimizer.step()
    return model, true


@case("activation checkpointing", own_clip=True)
def checkpointed(watch, clip):
    from torch.utils.checkpoint import checkpoint

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        hidden = checkpoint(model[:2], x, use_reentrant=False)
        ((model[2](hidden) - y) ** 2).mean().backward()
        true.append(true_norm(model.parameters()))
        early_bound(model.parameters(), clip)
        optimizer.step()
    return model, true


# --- optimizers --------------------------------------------------------------------------------


@case("AdamW, fused", own_clip=True)
def adamw_fused(watch, clip):
    return simple(
        watch,
        make=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
        clip=lambda m: early_bound(m.parameters(), clip),
    )


@case("nesterov, foreach: changes the gradients in the step", own_clip=True)
def nesterov(watch, clip):
    return simple(
        watch,
        make=lambda m: torch.optim.SGD(
            m.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True
        ),
        clip=lambda m: early_bound(m.parameters(), clip),
    )


@case("optimizer around an optimizer (Lookahead)")
def lookahead(watch, clip):
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups, {"lr": 0.05})

        def step(self, closure=None):
            return self.inner.step(closure)

    return simple(
        watch, make=lambda m: Lookahead(torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9))
    )


@case("subclass that calls super().step()")
def subclass(watch, clip):
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    return simple(watch, make=lambda m: Mine(m.parameters(), lr=0.05, momentum=0.9))


@case("clip inside the optimizer's step, one by one", imposable=False)
def inside_step(watch, clip):
    class Clipping(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    early_bound(p, clip)
            return super().step(closure)

    return simple(watch, make=lambda m: Clipping(m.parameters(), lr=0.05))


@case("clip in a step pre-hook of the loop's own", own_clip=True)
def own_pre_hook(watch, clip):
    def make(model):
        def normal(*_):
            early_bound(model.parameters(), clip)

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer.register_step_pre_hook(normal)
        return optimizer

    return simple(watch, make=make)


@case("clip each parameter by itself", finding="clip-one-by-one", imposable=False)
def one_by_one(watch, clip):
    def make(model):
        for i in range(8):
            model.register_parameter(f"extra{i}", nn.Parameter(torch.ones(2, device=DEVICE)))
        return torch.optim.SGD(model.parameters(), lr=0.01)

    model = net()
    optimizer = make(model)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        extra = sum(p.pow(2).sum() for n, p in model.named_parameters() if n.startswith("extra"))
        (loss_of(model, x, y) + extra).backward()
        true.append(true_norm(model.parameters()))
        for p in model.parameters():
            early_bound(p, clip)
        optimizer.step()
    return model, true


@case("clip each layer by itself", finding="clip-by-parts", imposable=False)
def layer_by_layer(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model[0].parameters()))
        for layer in (model[0], model[2]):
            early_bound(layer.parameters(), clip)
        optimizer.step()
    return model, true


@case("a class with step() that is no torch optimizer")
def duck(watch, clip):
    class Plain:
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters), "lr": 0.05}]

        def zero_grad(self, *, set_to_none=True):  # noqa: ARG002  an optimizer has it
            for p in self.param_groups[0]["params"]:
                p.grad = None

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.sub_(0.05 * p.grad)

    return simple(watch, make=lambda m: Plain(m.parameters()))


@case("a wrapper that holds the optimizer (Accelerate's way)", own_clip=True)
def wrapped(watch, clip):
    class Prepared:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        def step(self):
            self.optimizer.step()

        def zero_grad(self, *, set_to_none=True):
            self.optimizer.zero_grad(set_to_none=set_to_none)

    return simple(
        watch,
        make=lambda m: Prepared(torch.optim.SGD(m.parameters(), lr=0.05)),
        clip=lambda m: early_bound(m.parameters(), clip),
    )


@case("no optimizer object: hand-written update", own_clip=True)
def no_optimizer(watch, clip):
    model = net()
    watch(model)
    true = []
    for x, y in batches():
        model.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        early_bound(model.parameters(), clip)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad)
    return model, true


@case(
    "optimizer step inside backward()",
    finding="step-in-backward",
    imposable=False,
    refused=True,
    recorded=False,
)
def in_backward(watch, clip):
    model = net()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
    watch(list(optimizers.values()))

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for x, y in batches():
        loss_of(model, x, y).backward()
    return model, []


@case("lr as a tensor", own_clip=True)
def tensor_lr(watch, clip):
    return simple(
        watch,
        make=lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01)),
        clip=lambda m: early_bound(m.parameters(), clip),
    )


# --- clipping by the loop's own arithmetic -----------------------------------------------------


def by_hand(model, clip):
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    for p in model.parameters():
        p.grad.mul_(min(1.0, clip / (float(norm) + 1e-6)))


@case(
    'clip by own arithmetic, measure="backward"',
    imposable=False,
    options=(("measure", "backward"),),
)
def own_arithmetic(watch, clip):
    return simple(watch, clip=lambda m: by_hand(m, clip))


@case(
    "clip by own arithmetic, unseen",
    finding="changed-in-place",
    refused=True,
    imposable=False,
    recorded=False,
)
def own_arithmetic_unseen(watch, clip):
    return simple(watch, clip=lambda m: by_hand(m, clip))


# --- clip calls in the wrong place -------------------------------------------------------------


@case("clip after step()", finding="clip-after-step", imposable=False)
def after_step(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        optimizer.step()
        early_bound(model.parameters(), clip)
    return model, true


def before_backward(watch, clip, *, set_to_none):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        loss = loss_of(model, x, y)
        early_bound(model.parameters(), clip)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        true.append(true_norm(model.parameters()))
        optimizer.step()
    return model, true


@case("clip before backward()", finding="clip-before-backward", imposable=False)
def clip_before(watch, clip):
    return before_backward(watch, clip, set_to_none=True)


@case("clip before backward(), zeroed in place", finding="clip-before-backward", imposable=False)
def clip_before_zeroed(watch, clip):
    return before_backward(watch, clip, set_to_none=False)


@case("clip right after zero_grad()", finding="clip-without-gradients", imposable=False)
def clip_on_none(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        early_bound(model.parameters(), clip)
        loss.backward()
        true.append(true_norm(model.parameters()))
        optimizer.step()
    return model, true


@case("clip on an exhausted filter()", finding="clip-nothing", imposable=False)
def exhausted(watch, clip):
    model = net()
    trainable = filter(lambda p: p.requires_grad, model.parameters())
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    watch(optimizer)
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        early_bound(trainable, clip)
        optimizer.step()
    return model, true


@case(
    "a parameter passed twice",
    finding="duplicate-parameters",
    refused=True,
    imposable=False,
    recorded=False,
)
def duplicates(watch, clip):
    def clip_twice(model):
        parameters = list(model.parameters())
        early_bound([*parameters, parameters[0]], clip)

    return simple(watch, clip=clip_twice)


@case("a batch given up after its clip", imposable=False)
def given_up(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        early_bound(model.parameters(), clip)
        if i == 5:
            continue
        optimizer.step()
    return model, true


@case("error_if_nonfinite=True, caught", imposable=False)
def raising(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        (loss_of(model, x, y) * (math.inf if i == 5 else 1.0)).backward()
        true.append(true_norm(model.parameters()))
        try:
            early_bound(model.parameters(), clip, error_if_nonfinite=True)
        except RuntimeError:
            continue
        optimizer.step()
    return model, true


@case("steps without any gradient", finding="no-gradients", own_clip=False)
def no_gradients(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    true = []
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        if i % 4:
            loss_of(model, x, y).backward()
            true.append(true_norm(model.parameters()))
        optimizer.step()
    return model, true


# --- torch.compile -----------------------------------------------------------------------------


@case("torch.compile of the optimizer's step", own_clip=True)
def compiled_step(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    step = torch.compile(optimizer.step, backend=BACKENDS[0])
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        early_bound(model.parameters(), clip)
        step()
    return model, true


@case("torch.compile of the clip call", own_clip=True)
def compiled_clip(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)

    @torch.compile(backend=BACKENDS[0], fullgraph=True)
    def clip_all(parameters):
        return nn.utils.clip_grad_norm_(parameters, clip)

    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        clip_all(list(model.parameters()))
        optimizer.step()
    return model, true


@case("torch.compile of a clip call on another model, right before the step", own_clip=True)
def compiled_clip_elsewhere(watch, clip):
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)

    @torch.compile(backend=BACKENDS[0])
    def clip_all(parameters):
        return nn.utils.clip_grad_norm_(parameters, 0.1)

    true = []
    for x, y in batches():
        model.zero_grad()
        other.zero_grad()
        loss_of(model, x, y).backward()
        loss_of(other, 3 * x, y).backward()
        true.append(true_norm(model.parameters()))
        early_bound(model.parameters(), clip)
        clip_all(list(other.parameters()))
        optimizer.step()
    return model, true


@case("torch.compile of one clip over two optimizers", own_clip=True)
def compiled_clip_two_optimizers(watch, clip):
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.05)
    second = torch.optim.SGD(model[2].parameters(), lr=0.05)
    watch([first, second])

    @torch.compile(backend=BACKENDS[0])
    def clip_all(parameters):
        return nn.utils.clip_grad_norm_(parameters, clip)

    true = []
    for x, y in batches():
        model.zero_grad()
        loss_of(model, x, y).backward()
        true.append(true_norm(model.parameters()))
        clip_all(list(model.parameters()))
        first.step()
        second.step()
    return model, true


@case(
    "torch.compile of the clip call, after every micro-batch",
    finding="clip-in-accumulation",
    refused=True,
    imposable=False,
    recorded=False,
)
def compiled_clip_each_micro(watch, clip):
    @torch.compile(backend=BACKENDS[0])
    def clip_all(parameters):
        return nn.utils.clip_grad_norm_(parameters, clip)

    return accumulating(
        watch, after_each=lambda m: clip_all(list(m.parameters())), at_end=lambda _: None
    )


@case("torch.compile of the model", own_clip=True)
def compiled_model(watch, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(optimizer)
    compiled = torch.compile(model, backend=BACKENDS[1])
    true = []
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(compiled, x, y).backward()
        true.append(true_norm(model.parameters()))
        early_bound(model.parameters(), clip)
        optimizer.step()
    return model, true
