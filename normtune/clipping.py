"""The spies in torch's clip functions: each call is told to its recorders before it scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normtune import gradients, listening
from normtune.callsites import call_site
from normtune.listening import (
    COMPILED,
    ClipCall,
    listeners_of_thread,
    listeners_to,
    listeners_to_clip,
    ranked,
)

originals: dict[str, Callable[..., Any]] = {}  # what stood where the spies stand now


def spy_clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,  # noqa: FBT001, FBT002  torch's own signature
    foreach: bool | None = None,  # noqa: FBT001  torch's own signature
) -> Tensor:
    """Stands in for the body of `torch.nn.utils.clip_grad_norm_`, inside torch's own no_grad."""
    original: Callable[..., Tensor] = originals["clip_grad_norm_"]
    if torch.compiler.is_compiling() or (not listening.owners and listening.resident is None):
        return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    as_list = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not as_list:
        _tell_nothing(call_site(), float(max_norm))
        return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    listeners = listeners_to(as_list) if listening.resident is None else listeners_to_clip(as_list)
    if not listeners:
        return original(as_list, max_norm, norm_type, error_if_nonfinite, foreach)
    grads = [g for p in as_list if (g := p.grad) is not None]
    plain = bool(grads) and foreach is not False and gradients.is_plain(grads)
    p, asked = float(norm_type), max_norm if type(max_norm) is float else as_float(max_norm)
    call = ClipCall(call_site(), "norm", as_list, grads, asked, p, None, plain)
    try:
        total_norm = gradients.torch_total_norm(grads, p, error_if_nonfinite, foreach, plain=plain)
    except RuntimeError:
        _tell_failed(listeners, call)
        raise
    call.total_norm = total_norm
    if plain and grads[0].is_cpu and grads[0].dtype not in gradients.HALF:
        call.value = total_norm.item()
    _clip(call, listeners, max_norm, foreach)
    return total_norm


def spy_clip_grads_with_norm_(
    parameters: Any,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,  # noqa: FBT001  torch's own signature
) -> None:
    """Stands in for `torch.nn.utils.clip_grads_with_norm_`, compiled or not."""
    original = originals["_clip_grads_with_norm_"]
    if torch.compiler.is_compiling():
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if COMPILED.watched:
            COMPILED.total_norm = total_norm
            COMPILED.parameters = parameters
            COMPILED.asked = max_norm
        imposed = COMPILED.limit(parameters)
        if imposed == 0.0:
            original(parameters, max_norm, total_norm, foreach)
        elif imposed != float("inf"):
            original(parameters, imposed, total_norm, foreach)
        return
    if listening.nobody():
        original(parameters, max_norm, total_norm, foreach)
        return
    as_list = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    listeners = listeners_to_clip(as_list)
    if not listeners:
        original(as_list, max_norm, total_norm, foreach)
        return
    grads = [p.grad for p in as_list if p.grad is not None]
    asked = as_float(max_norm)
    call = ClipCall(call_site(), "given", as_list, grads, asked, None, total_norm)
    call.plain = bool(grads) and foreach is not False and gradients.is_plain(grads)
    _clip(call, listeners, max_norm, foreach)


def spy_clip_grad_value_(
    parameters: Any,
    clip_value: float,
    foreach: bool | None = None,  # noqa: FBT001  torch's own signature
) -> None:
    """Stands in for the body of `torch.nn.utils.clip_grad_value_`."""
    original = originals["clip_grad_value_"]
    if torch.compiler.is_compiling() or listening.nobody():
        original(parameters, clip_value, foreach)
        return
    as_list = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    listeners = listeners_to_clip(as_list)
    if not listeners:
        original(as_list, clip_value, foreach)
        return
    grads = [p.grad for p in as_list if p.grad is not None]
    call = ClipCall(call_site(), "value", as_list, grads, as_float(clip_value), 2.0, None)
    limit = ask(listeners, call)
    if limit is None:
        original(as_list, clip_value, foreach)
    elif limit != float("inf") and grads:
        clip_now(as_list, grads, limit, foreach=foreach)
    tell_end(listeners, call)


def _clip(
    call: ClipCall,
    listeners: list[Any],
    max_norm: Any,
    foreach: bool | None,  # noqa: FBT001  torch's own argument
) -> None:
    """Scale as the loop asked, or as a listener imposes."""
    limit = listeners[0].clip_begins(call) if len(listeners) == 1 else ask(listeners, call)
    assert call.total_norm is not None  # noqa: S101  only value clips have none
    if limit is None:
        limit = max_norm
    elif limit == float("inf"):
        tell_end(listeners, call)
        return
    if call.plain and (type(limit) is float or isinstance(limit, int | float)):
        gradients.clip_(call.grads, limit, call.total_norm, call.value)
    else:
        originals["_clip_grads_with_norm_"](call.parameters, limit, call.total_norm, foreach)
    tell_end(listeners, call)


@torch.no_grad()
def clip_now(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    max_norm: float,
    *,
    norm_type: float = 2.0,
    foreach: bool | None = None,
    scale: Tensor | None = None,
) -> None:
    """Clip as `torch.nn.utils.clip_grad_norm_` would, bit for bit, unseen by the spies."""
    if any(g.layout != torch.strided for g in grads) or _on_several_meshes(grads):
        # torch clips none of these, but a max_norm for such a training is a fair question
        total = _unscaled(gradients.total_norm(grads, norm_type), scale)
        gradients.scale_each(grads, gradients.coefficient(max_norm, total))
        return
    plain = foreach is not False and gradients.is_plain(grads)
    total = gradients.torch_total_norm(grads, norm_type, False, foreach, plain=plain)
    total = _unscaled(total, scale)
    if plain:
        gradients.clip_(grads, max_norm, total)
    else:
        originals["_clip_grads_with_norm_"](list(parameters), max_norm, total, foreach)


def _on_several_meshes(grads: Sequence[Tensor]) -> bool:
    meshes = {getattr(g, "device_mesh", None) for g in grads}
    return len(meshes) > 1


def _unscaled(norm: Tensor, scale: Tensor | None) -> Tensor:
    return norm if scale is None else norm / scale.to(norm.device)


def as_float(value: Any) -> float:
    """What the loop asked for as a number; nan for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def ask(listeners: list[Any], call: ClipCall) -> float | None:
    """What the listeners impose; the youngest that imposes anything wins."""
    limit = None
    for listener in ranked(listeners) if len(listeners) > 1 else listeners:
        wanted = listener.clip_begins(call)
        limit = wanted if wanted is not None else limit
    return limit


def tell_end(listeners: list[Any], call: ClipCall) -> None:
    """The call has scaled the gradients, or left them."""
    for listener in listeners:
        listener.clip_ends(call)


def _tell_failed(listeners: list[Any], call: ClipCall) -> None:
    for listener in listeners:
        listener.clip_failed(call)


def _tell_nothing(site: str, asked: float) -> None:
    call = ClipCall(site, "norm", [], [], asked, None, None)
    for listener in listeners_of_thread():
        listener.clip_found_nothing(call)
