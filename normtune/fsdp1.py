"""The clip method of FSDP1, which reduces over ranks by its own arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from normtune.callsites import call_site
from normtune.clipping import as_float, ask, tell_end
from normtune.listening import ClipCall, listeners_to_clip

if TYPE_CHECKING:
    from torch import Tensor

NEVER_CLIPS = 1e38  # FSDP1 makes nan of every gradient at inf, where its norm overflows


def watch_fsdp() -> None:
    """FSDP1 clips its shards by its own arithmetic, in a method of the model."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    clip = FullyShardedDataParallel.clip_grad_norm_
    if getattr(clip, "visible_to_normtune", False):
        return

    @functools.wraps(clip)
    def normtune_clip(self: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        parameters = list(self.parameters())
        listeners = listeners_to_clip(parameters)
        handles = getattr(self, "_all_handles", None) or ()
        if not listeners or not any(h.uses_sharded_strategy for h in handles):
            return clip(self, max_norm, norm_type)  # torch's own clip, seen there
        return _clip_fsdp(self, clip, parameters, listeners, (max_norm, norm_type))

    normtune_clip.visible_to_normtune = True  # type: ignore[attr-defined]
    FullyShardedDataParallel.clip_grad_norm_ = normtune_clip  # type: ignore[method-assign]


def _clip_fsdp(
    model: Any,
    clip: Callable[..., Any],
    parameters: list[Tensor],
    listeners: list[Any],
    asked: tuple[float, float],
) -> Tensor:
    max_norm, norm_type = asked
    imposed = [m for x in listeners if (m := getattr(x, "max_norm", None)) is not None]
    limit = min(imposed[-1], NEVER_CLIPS) if imposed else max_norm
    total_norm: Tensor = clip(model, limit, norm_type)
    grads = [p.grad for p in parameters if p.grad is not None]
    call = ClipCall(
        call_site(), "given", parameters, grads, as_float(max_norm), float(norm_type), total_norm
    )
    ask(listeners, call)  # only now is the norm known, and clipped is what it was
    tell_end(listeners, call)
    return total_norm
