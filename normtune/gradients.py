"""The norm of gradients, read-only and in fp32 at least, and torch's own arithmetic of clipping."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

HALF = (torch.float16, torch.bfloat16)
FEW = 64  # gradients
VERY_FEW = 8  # the call for many costs more than it saves
PLAIN = (Tensor, torch.nn.Parameter)
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
EPSILON = 1e-6  # the one in torch's coefficient, max_norm / (total_norm + 1e-6)


def unwrapped(target: Any) -> Any:
    """The optimizer inside wrappers that hold it as ``.optimizer`` (Accelerate, DeepSpeed)."""
    seen = 0
    while not hasattr(target, "_optimizer_step_pre_hooks") and seen < 10:
        inner = getattr(target, "optimizer", None)
        if inner is None or not hasattr(inner, "param_groups"):
            break
        target, seen = inner, seen + 1
    return target


def parameters_of(target: Any) -> list[Tensor]:
    """The parameters of an optimizer, a module, or an iterable of parameters, each once."""
    if isinstance(target, torch.nn.Module):
        found: Iterable[Tensor] = target.parameters()
    elif hasattr(target, "param_groups"):
        found = (p for group in target.param_groups for p in group["params"])
    else:
        found = target
    return list({id(p): p for p in found}.values())


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that exist."""
    return [p.grad for p in parameters if p.grad is not None]


def is_plain(grads: Sequence[Tensor]) -> bool:
    """Whether all gradients are dense, of one device and one floating dtype, and no subclass."""
    first = grads[0]
    dtype, strided = first.dtype, torch.strided
    if not dtype.is_floating_point:
        return False
    on_cpu = first.is_cpu
    for g in grads:  # a plain loop: this runs at every step
        if (
            type(g) not in PLAIN
            or g.dtype is not dtype
            or g.layout is not strided
            or g.is_cpu is not on_cpu
        ):
            return False
    return on_cpu or all(g.device == first.device for g in grads)


@torch.no_grad()
def norms_of_each(grads: Sequence[Tensor], norm_type: float = 2.0) -> list[Tensor]:
    """The norm of each gradient as a 0-dim tensor of fp32 or wider, left on its device.

    Args:
        grads: Gradients of any floating or complex dtype; sparse ones are coalesced in a copy,
            sharded ones (DTensor) reduced over their mesh.
        norm_type: The p of the norm.
    """
    if not grads:
        return []
    if is_plain(grads):
        return list(_plain_norms(grads, norm_type))
    return [_norm_of_one(g, norm_type) for g in grads]


def _plain_norms(grads: Sequence[Tensor], norm_type: float) -> Sequence[Tensor]:
    if not isinstance(grads, list):
        grads = list(grads)
    wide = _WIDE.get(grads[0].dtype)  # None keeps the gradients' own
    if wide is None:  # each option costs
        norms = torch._foreach_norm(grads, norm_type)
    else:
        norms = torch._foreach_norm(grads, norm_type, dtype=wide)
    return norms


def _norm_of_one(grad: Tensor, norm_type: float, dtype: torch.dtype | None = None) -> Tensor:
    dense = grad.detach()
    if dense.layout == torch.sparse_coo:
        dense = dense.coalesce().values()  # a copy where it was not coalesced; never in place
    elif dense.layout != torch.strided:
        dense = dense.values()
    if dense.is_complex():
        dense = dense.abs()
    norm = torch.linalg.vector_norm(dense, norm_type, dtype=dtype or _WIDE.get(dense.dtype))
    return whole(norm)


def is_shared(tensor: Tensor) -> bool:
    """Whether other ranks hold a part of it, so that its value needs them all."""
    placements = getattr(tensor, "placements", ())
    return any(not p.is_replicate() for p in placements)


def whole(norm: Tensor) -> Tensor:
    """A DTensor's value over all its ranks; a plain tensor as it is.

    Never ``item()`` or ``to_local()``: the norm of a shard is partial, and they would return it.
    """
    full = getattr(norm, "full_tensor", None)
    return norm if full is None else cast("Tensor", full())


@torch.no_grad()
def combined(norms: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of a vector whose parts have these norms, on the device of the first."""
    if not norms:
        return torch.tensor(0.0)
    device = norms[0].device
    dtype = max((n.dtype for n in norms), key=lambda d: torch.finfo(d).bits)
    return _vector_norm([n.to(device=device, dtype=dtype) for n in norms], norm_type)


def _vector_norm(norms: Sequence[Tensor], norm_type: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)  # type: ignore[arg-type]
    return norm


@torch.no_grad()
def total_norm(
    grads: Sequence[Tensor], norm_type: float = 2.0, *, like: Sequence[Tensor] = ()
) -> Tensor:
    """The norm of all gradients as one vector, before any clipping.

    Equal to `torch.nn.utils.get_total_norm` bit for bit for dense gradients of fp32 or fp64 on
    one device. Half precision is measured in fp32, where torch returns inf above 65504 (fp16)
    or three digits (bf16). On the CPU a sum that leaves the range of fp32 is taken again in fp64.

    Args:
        grads: The gradients; they are only read.
        norm_type: The p of the norm.
        like: Sharded parameters that the gradients are of: where this rank has no gradient of
            some, it still takes part in the reduction that the others wait for.

    Returns:
        A 0-dim tensor on the device of the first gradient; reading it may wait for the device.
    """
    if not grads and not like:
        return torch.tensor(0.0)
    if grads and is_plain(grads) and not any(map(is_shared, like)):
        total = _vector_norm(_plain_norms(grads, norm_type), norm_type)
    else:
        total = combined(_norms_of_parts(grads, norm_type, like), norm_type)
    if total.is_cpu:
        return rescued(total, grads, norm_type)
    return total


def _norms_of_parts(grads: Sequence[Tensor], norm_type: float, like: Sequence[Any]) -> list[Tensor]:
    """The norm of each gradient, but of one for all that are sharded alike."""
    parts: list[Tensor] = []
    alike: dict[Any, list[Any]] = {_sharding(p): [] for p in like if hasattr(p, "placements")}
    failures: list[Exception] = []
    for grad in grads:
        placements = getattr(grad, "placements", None)
        if placements is None or any(p.is_partial() for p in placements):
            with _noting(failures):
                parts.append(_norm_of_one(grad, norm_type))
        else:
            alike.setdefault(_sharding(grad), []).append(grad)
    shards = [_norm_of_shards(some, key, norm_type, failures) for key, some in alike.items()]
    if failures:  # only now: the other ranks wait for this one in each of these reductions
        raise failures[0]
    return parts + shards


@contextlib.contextmanager
def _noting(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failures.append(error)


def _sharding(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements


def _norm_of_shards(
    grads: Sequence[Any],
    sharding: tuple[Any, Sequence[Any]],
    norm_type: float,
    failures: list[Exception],
) -> Tensor:
    """The norm of gradients of one mesh and placement, by one reduction over each sharded axis.

    Torch's own norm of such gradients reduces each by itself. Replicated axes count once.
    """
    mesh, placements = sharding
    norm = torch.zeros((), device=mesh.device_type)
    with _noting(failures):
        full = [g._local_tensor for g in grads if g._local_tensor.numel()]  # none has an inf norm
        norms = norms_of_each(full, norm_type)
        norm = combined(norms, norm_type) if norms else norm
    shared = [i for i, p in enumerate(placements) if not p.is_replicate()]
    if not shared:
        return norm
    largest = norm_type == math.inf
    wide = norm if norm.device.type == "mps" else norm.double()  # its square may not fit fp32
    value = wide if largest else wide**norm_type
    operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
    for i in shared:
        group = mesh.get_group(i)
        torch.distributed.all_reduce(value, operation, group=group)
    return value if largest else value ** (1.0 / norm_type)


def rescued(total: Tensor, grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """`total`, taken again in fp64 where fp32 gave inf or 0 for what it cannot square."""
    value = total.item()
    if 0.0 < value < math.inf or math.isnan(value) or total.dtype == torch.float64:
        return total
    norms = [_norm_of_one(_at_least_64(g), norm_type) for g in grads]
    return _vector_norm(norms, norm_type)


def _at_least_64(grad: Tensor) -> Tensor:
    return grad.to(torch.complex128 if grad.is_complex() else torch.float64)


def measured(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor | float:
    """`total_norm`, as a number where the gradients are on the CPU and as a tensor elsewhere.

    A few small gradients on the CPU are combined in Python: three more torch operations would
    cost a small model more than the norms themselves. The number then has fp64's last digits.
    """
    n = len(grads)
    few = 0 < n <= FEW and norm_type == 2.0 and grads[0].is_cpu and is_plain(grads)
    if few and not grads[0].requires_grad:
        if n <= VERY_FEW and grads[0].dtype not in HALF:
            value = math.hypot(*map(torch.linalg.vector_norm, grads))
        else:
            value = math.hypot(*_plain_norms(grads, 2.0))
        if 0.0 < value < math.inf or math.isnan(value):
            return value
    return on_host(total_norm(grads, norm_type))


def on_host(norm: Tensor) -> Tensor | float:
    """The number itself where that costs no waiting; a norm on a device stays there."""
    return norm.item() if norm.is_cpu else norm


def torch_total_norm(
    grads: Sequence[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,  # noqa: FBT001, FBT002  torch's own signature
    foreach: bool | None = None,  # noqa: FBT001  torch's own signature
    *,
    plain: bool = False,
) -> Tensor:
    """What `torch.nn.utils.get_total_norm` returns, bit for bit, by a shorter way where one is.

    Called where gradients are off, like `clip_`: another no_grad would be felt in small models.

    Args:
        grads: The gradients.
        norm_type: The p of the norm.
        error_if_nonfinite: As in torch.
        foreach: As in torch.
        plain: What `is_plain` says of them, and foreach is not False.
    """
    if plain and not error_if_nonfinite:
        own = grads if isinstance(grads, list) else list(grads)
        norms = torch.stack(torch._foreach_norm(own, norm_type))
        return torch.linalg.vector_norm(norms, norm_type)  # type: ignore[no-any-return]
    total: Tensor = clip_grad._get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    return total


def coefficient(max_norm: float, norm: Tensor) -> Tensor:
    """The factor torch scales gradients with: ``max_norm / (norm + 1e-6)``, at most 1."""
    return torch.clamp(max_norm / (norm + EPSILON), max=1.0)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number of this rank is nan or infinite; reads each device once."""
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor).detach()
        flags.setdefault(local.device, []).append(torch.isfinite(local).all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


@torch.no_grad()
def scale_each(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient in place, sparse ones too."""
    for grad in grads:
        local = getattr(grad, "_local_tensor", grad)  # the same factor on every rank
        local.mul_(factor.to(local.device))


def clip_(
    grads: Sequence[Tensor], max_norm: float, norm: Tensor, value: float | None = None
) -> bool | None:
    """Scale dense gradients of one device and dtype in place, as torch's clip does, bit for bit.

    On the CPU the multiplication is left out where the factor is 1.0, which changes nothing: torch
    multiplies to spare a device read that the CPU does not need.

    Args:
        grads: The gradients.
        max_norm: The limit.
        norm: Their norm, as torch has it.
        value: The same as a number, where it is on the CPU and known.

    Returns:
        Whether the gradients were scaled; None where only the device knows.
    """
    on_cpu = value is not None or norm.is_cpu
    if on_cpu:
        value = norm.item() if value is None else value
        if math.isfinite(value) and value + EPSILON <= max_norm * (1 - EPSILON):
            return False
    factor = coefficient(max_norm, norm)
    if on_cpu and factor.item() >= 1.0:
        return False
    torch._foreach_mul_(list(grads), factor if on_cpu else factor.to(grads[0].device))
    return True if on_cpu else None
