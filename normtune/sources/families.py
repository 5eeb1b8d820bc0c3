"""Frameworks by what they log: which side of clipping a value is on, and what it stands for."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

ClipSide = Literal["before", "after", "unknown"]
Value = Literal["each step", "last of window", "mean of window", "unknown"]


@dataclass(frozen=True)
class Family:
    """One framework's way to log a gradient norm.

    Attributes:
        name: The framework.
        side: Whether it logs the norm before or after clipping.
        value: What one logged value stands for.
        key: The names that it uses.
        beside: Names of which at least one stands beside the norm; empty where the key is enough.
    """

    name: str
    side: ClipSide = "unknown"
    value: Value = "unknown"
    key: re.Pattern[str] = field(default=re.compile(""))
    beside: frozenset[str] = frozenset()


def _family(name: str, side: ClipSide, value: Value, key: str, beside: str = "") -> Family:
    return Family(name, side, value, re.compile(key), frozenset(beside.split()))


UNKNOWN = Family("")
HF = Family("Hugging Face Trainer", "before", "last of window")

# The first that fits wins, so that a key of one framework stands before a key of many.
FAMILIES = (
    _family("fairseq", "before", "mean of window", r"(?:.*/)?(?:train_)?gnorm"),
    _family("MaxText", "before", "last of window", r"learning/raw_grad_norm"),
    _family("MaxText", "after", "last of window", r"learning/grad_norm"),
    _family("MosaicML Composer", "after", "last of window", r"l2_norm/grad/global"),
    _family("OLMo", "before", "last of window", r"optim/total[_ ]grad[_ ]norm"),
    _family(
        "lingua", "before", "last of window", r"optim/grad_norm", "speed/wps speed/FLOPS acc_step"
    ),
    _family("big_vision", "before", "last of window", r"l2_grads"),
    _family("RLlib", "after", "mean of window", r".*learner_stats/grad_gnorm"),
    _family("BenchMARL", "before", "mean of window", r"train/[^/]+/grad_norm_loss_\w+"),
    _family("verl", "before", "mean of window", r"(?:data/)?(?:actor|critic)/grad_norm"),
    _family("Lightning", "before", "last of window", r"(?:.*/)?grad_\d[\d.]*_norm_total(?:_step)?"),
    _family("Megatron-LM", "before", "last of window", r"(?:.*/)?grad-norm"),
    _family(
        "mmcv",
        "before",
        "mean of window",
        r"(?:train/)?grad_norm",
        "data_time train/data_time momentum mode",
    ),
    _family(
        "ms-swift",
        "before",
        "last of window",
        r"(?:train/)?grad_norm",
        "global_step/max_steps train_speed(iter/s)",
    ),
    _family("openpi", "before", "mean of window", r"grad_norm", "param_norm"),
    _family(
        "Hugging Face Trainer",
        "before",
        "last of window",
        r"(?:train/)?grad_norm",
        "learning_rate train/learning_rate train/epoch train/global_step",
    ),
    _family(
        "torchtitan",
        "before",
        "last of window",
        r"grad_norm",
        "loss_metrics/global_avg_loss loss_metrics/global_max_loss",
    ),
    _family("torchtune", "before", "last of window", r"grad_norm", "tokens_per_second_per_gpu"),
    _family(
        "AlgoPerf",
        "unknown",
        "each step",
        r"grad_norm",
        "preemption_count accumulated_submission_time",
    ),
    _family(
        "LeRobot",
        "before",
        "mean of window",
        r"(?:train/)?grad_norm",
        "train/dataloading_s train/update_s",
    ),
)


def family(key: str, beside: Collection[str]) -> Family:
    """The framework that logs `key` next to the names `beside`.

    >>> family("train/grad_norm", {"train/epoch"}).name
    'Hugging Face Trainer'
    >>> family("my_norm", {"loss"}).side
    'unknown'
    """
    for known in FAMILIES:
        if known.key.fullmatch(key) and (not known.beside or not known.beside.isdisjoint(beside)):
            return known
    return UNKNOWN
