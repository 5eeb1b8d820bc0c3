"""What normtune reads off an optimizer: its parameters, names, rates, and a GradScaler's marks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from normtune import gradients

Groups = (
    torch.nn.Module | Mapping[str, Any] | Iterable[tuple[str, Tensor]] | Literal["param_groups"]
)


def targets(target: Any) -> tuple[list[Any], list[Tensor]]:
    """The optimizers and the parameters that the user means."""
    if target is None:
        return [], []
    several = isinstance(target, list | tuple) and not any(isinstance(t, Tensor) for t in target)
    candidates = list(target) if several else [target]
    if all(_is_optimizer(c) for c in candidates) and candidates:
        optimizers = [gradients.unwrapped(c) for c in candidates]
        found = [p for o in optimizers for p in gradients.parameters_of(o)]
        return optimizers, list({id(p): p for p in found}.values())
    if isinstance(target, Tensor):
        return [], [target]
    try:
        found = gradients.parameters_of(target)
    except TypeError:
        found = []
    if not found or not all(isinstance(p, Tensor) for p in found):
        message = (
            "optimizer must be an optimizer, a list of them, a module or parameters but got "
            f"{type(target).__name__}; pass what your loop calls .step() on"
        )
        raise ValueError(message)
    return [], found


def _is_optimizer(target: Any) -> bool:
    return hasattr(gradients.unwrapped(target), "param_groups")


def group_names(groups: Groups | None, optimizers: Sequence[Any]) -> dict[int, str]:
    """For each parameter the name of the group whose norm is recorded."""
    if groups is None:
        return {}
    if isinstance(groups, str):
        if groups != "param_groups" or not optimizers:
            message = f'groups must be a module, a mapping or "param_groups" but got {groups!r}'
            raise ValueError(message)
        found = [g for o in optimizers for g in o.param_groups]
        return {
            id(p): str(g.get("name", f"group {i}"))
            for i, g in enumerate(found)
            for p in g["params"]
        }
    if isinstance(groups, torch.nn.Module):
        return {id(p): name for name, p in groups.named_parameters()}
    pairs = groups.items() if isinstance(groups, Mapping) else groups
    return {
        id(p): str(name)
        for name, members in pairs
        for p in gradients.parameters_of(_listed(members))
    }


def _listed(members: Any) -> Any:
    return [members] if isinstance(members, Tensor) else members


def parameters(optimizer: Any) -> list[Tensor]:
    """The parameters that a step of it changes, in order."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return groups[0]["params"]  # type: ignore[no-any-return]
    return [p for group in groups for p in group["params"]]


def name_of(optimizer: Any) -> str:
    """The name of its class."""
    return type(optimizer).__name__


def facts(optimizers: Sequence[Any]) -> dict[str, Any]:
    """What the header of a record says about the optimizers."""
    if not optimizers:
        return {"optimizer": None}
    found: dict[str, Any] = {"optimizer": "+".join(name_of(o) for o in optimizers)}
    first = optimizers[0].param_groups[0]
    for key in ("eps", "betas", "momentum", "weight_decay"):
        value = first.get(key)
        if isinstance(value, int | float | tuple | list):
            found[key] = value
    found["lr"] = found["lr_initial"] = rate(optimizers[0])
    return found


def rate(optimizer: Any) -> float:
    """The learning rate of the first group; nan where reading it would wait for the device."""
    if optimizer is None:
        return math.nan
    lr = optimizer.param_groups[0].get("lr")
    if type(lr) is float:  # nearly always
        return lr
    if isinstance(lr, Tensor):
        return float(lr) if lr.device.type == "cpu" else math.nan
    return float(lr) if isinstance(lr, int | float) else math.nan


def amp_marks(optimizer: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler hands a fused optimizer: the scale still on the gradients, found_inf."""
    scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    return (
        scale.detach().clone() if isinstance(scale, Tensor) else None,
        found_inf.detach().clone() if isinstance(found_inf, Tensor) else None,
    )
