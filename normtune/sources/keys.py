"""Names of logged values: which of them is a gradient norm, of what, before or after clipping."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

Role = Literal["before", "total", "weak", "after", "epoch", "part", "other"]
"""What a name says of its values.

``before``: a total norm, expressly before clipping. ``total``: a total norm. ``weak``: a name
like ``norm`` that may be one. ``after``: a total norm, expressly after clipping. ``epoch``: its
mean over an epoch. ``part``: the norm of a layer or group. ``other``: no gradient norm.
"""

_GRAD = r"(?:grad|grads|gradient|gradients|g)"
_L = r"(?:l2|2|2_0|global|total|tot|all)"
_TOTAL = re.compile(
    r"(?:(?:train|training|total|tot|global|overall|full|model|all|avg|mean|average|l2|unscaled"
    r"|running|step|batch|iter|optim|learning|default_optimizer|gradients_default_optimizer)_)*"
    rf"(?:{_GRAD}_?(?:{_L}_?){{0,3}}norms?|norms?_?(?:of_)?{_GRAD}|l2_(?:norm_)?{_GRAD}|gnorm|grad_gnorm|grdn"
    r"|grad(?:ient)?s?_(?:total|l2|mag|magnitude)|gradients_default_optimizer_global_norm)"
    rf"(?:_(?:{_L}|overall|mean|avg|average|step|value|unscaled|model|train|s))*"
)
_WEAK = frozenset({"norm", "total_norm", "global_norm", "norm_total", "gn", "g_norm"})
_BEFORE = re.compile(
    r"(?:^|_)(?:(?:before|pre)_?clip(?:ping|ped)?|before|raw|un_?clipped|orig(?:inal)?|not_clipped)(?=_|$)"
)
_AFTER = re.compile(r"(?:^|_)(?:(?:after|post)_?clip(?:ping|ped)?|after|clipped)(?=_|$)")
_EPOCH = re.compile(r"(?:_epoch|^train_gnorm)$")
_NO_NORM = re.compile(
    r"(?:^|_)(?:params?|parameters?|weights?|updates?|layer_?norm|rms|rms_?norm|batch_?norm|eps|epsilon"
    r"|activations?|ratio|std|stdev|var|variance|coeff?|scaler?|count|num|share|fraction|frac"
    r"|threshold|limit|cos|cosine|sim|similarity|angle|diff|log|min|max|median|p\d+|q\d+|skipped"
    r"|clip_(?:rate|pct|percent|frac|fraction|ratio|value|val|coef)|vs_samples|momentum|ema|zscore"
    r"|clip_norm|norm_clip|norm_clipping|norm_type|clip_grad_norm|max_norm|target|penalty|gp)(?=_|$)"
)
_PLACE = re.compile(
    r"(?:layers?|blocks?|h|embed\w*|wte|wpe|lm_head|head|encoder|decoder|attn|attention|mlp|conv\w*"
    r"|fc\w*|bias|by_\w+|per_\w+|group_?\d*|params?)(?:_?\d+)?(?:_.*)?"
)
_CHART = re.compile(r"^.{0,200} - (?=[^ ]+$)")


@lru_cache(maxsize=4096)
def role(name: str) -> Role:
    """What the name of a column, key or tag says.

    >>> role("train/grad_norm"), role("grad_2.0_norm_total"), role("l2_norm/grad/global")
    ('total', 'total', 'total')
    >>> role("grad_norm_before_clip"), role("grad_norm_clipped"), role("grad/norm_gamma")
    ('before', 'after', 'part')
    >>> role("param_norm"), role("max_grad_norm"), role("norm/avg_shift_k")
    ('other', 'other', 'other')
    """
    plain = _plain(name)
    last = plain.rpartition("/")[2]
    if _NO_NORM.search(last) or plain.endswith(("__min", "__max")):
        return "other"
    return _whole(plain, last) or _rest(plain)


def _plain(name: str) -> str:
    text = _CHART.sub("", name[:300].strip()).lower()
    return re.sub(r"[^\w/]+", "_", text).strip("_")


def _whole(plain: str, last: str) -> Role | None:
    side: Role = "total"
    if _BEFORE.search(last):
        side, last = "before", _BEFORE.sub("", last).strip("_")
    elif _AFTER.search(last):
        side, last = "after", _AFTER.sub("", last).strip("_")
    epoch = bool(_EPOCH.search(last))
    last = re.sub(r"_epoch$", "", last)
    parents = plain.split("/")[:-1]
    if any(_PLACE.fullmatch(parent) for parent in parents[-2:]):
        return None
    if last in _WEAK and not any("grad" in parent for parent in parents):
        return "weak"
    endings = ("_".join([*parents[-n:], last] if n else [last]).strip("_") for n in (0, 1, 2))
    if not any(_TOTAL.fullmatch(ending) for ending in endings):
        return None
    return "epoch" if epoch else side


def _rest(plain: str) -> Role:
    grad = re.search(r"grad|(?:^|[_/])g(?:_|$)", plain)
    return "part" if grad and "norm" in plain else "other"
