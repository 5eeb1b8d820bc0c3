"""The one dispatcher of a process that sees every clip call and every optimizer step.

It is installed once and stays: spies in the clip functions (`clipping`), hooks at the steps
(`stepping`); both tell the recorders of the parameters (`listening`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from normtune import clipping, fsdp1, listening, stepping
from normtune.errors import NormtuneError

_lock = threading.Lock()
_installed = False


def listen(listener: listening.Listener, parameters: Iterable[Tensor]) -> None:
    """Tell `listener` of every clip call and step on `parameters`; kept by weak references."""
    install()
    if "torch.distributed.fsdp" in sys.modules:
        fsdp1.watch_fsdp()
    listening.listen(listener, parameters)


def reside(resident: listening.Resident | None) -> None:
    """Show `resident` every clip call and step, also on parameters that nobody listens to."""
    install()
    listening.reside(resident)


def install() -> None:
    """Install the dispatcher; a second call changes nothing, and nothing takes it away again.

    Raises:
        NormtuneError: If this version of torch is built differently from those that were tried.
    """
    global _installed  # noqa: PLW0603  one dispatcher per process
    with _lock:
        if _installed:
            return
        for name, spy in {
            "clip_grad_norm_": clipping.spy_clip_grad_norm_,
            "_clip_grads_with_norm_": clipping.spy_clip_grads_with_norm_,
            "clip_grad_value_": clipping.spy_clip_grad_value_,
        }.items():
            clipping.originals[name] = _replace_wrapped(getattr(clip_grad, name), spy)
        for hook in (stepping.before_step, stepping.after_step):
            stepping.untraced[hook.__name__] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        register_optimizer_step_pre_hook(stepping.before_step)
        register_optimizer_step_post_hook(stepping.after_step)
        stepping.watch_scaler()
        _installed = True


def _replace_wrapped(function: Any, spy: Any) -> Callable[..., Any]:
    """Put `spy` into the closure of torch's ``no_grad`` wrapper; returns what stood there.

    Every reference to the function, early-bound or not, goes through that one cell.
    """
    names = function.__code__.co_freevars if isinstance(function, FunctionType) else ()
    if "func" not in names or function.__closure__ is None:
        message = (
            f"torch {torch.__version__} builds {getattr(function, '__name__', function)} in a way "
            "that this normtune does not know; please update normtune"
        )
        raise NormtuneError(message)
    cell = function.__closure__[names.index("func")]
    original: Callable[..., Any] = cell.cell_contents
    cell.cell_contents = spy
    return original
