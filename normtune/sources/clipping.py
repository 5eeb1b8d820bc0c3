"""The max_norm that a run used, where its log or a config beside the log states it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from normtune.sources.numbers import TEXT, number

LARGEST_CONFIG = 1 << 20
CONFIGS = (
    "args.json",
    "training_args.json",
    "train_args.json",
    "config.yaml",
    "config.yml",
    "config.json",
    "hparams.yaml",
    "hparams.json",
    "params.json",
    ".hydra/config.yaml",
    "files/config.yaml",
    "train_config.json",
    "train_config.yaml",
    "hyperparameters.json",
    "cfg.yaml",
    "params.yaml",
)
KEYS = frozenset(
    {
        "max_grad_norm",
        "clip_grad",
        "clip_grad_norm",
        "grad_clip",
        "grad_clip_norm",
        "gradient_clip_val",
        "gradient_clipping",
        "clip_norm",
        "clip_gradient_norm",
        "grad_norm_clip",
        "max_gradient_norm",
        "gradient_clip_norm",
        "gradient_clipping_threshold",
        "gradient_clip",
        "global_clipnorm",
        "grad_norm_clipping",
        "max_norm_grad",
        "clip_grad_max_norm",
        "clip_max_norm",
        "grad_max_norm",
        "gradient_max_norm",
        "grad_clip_val",
        "clip_grad_val",
        "max_grad",
        "grad_clipping",
    }
)
_SECTIONS = frozenset({"training", "clip", "clip_grad", "grad_clip", "gradient_clipping"})
_KINDS = ("gradient_clip_algorithm", "clipping_type", "grad_clip_method")
_INNER = ("max_norm", "clipping_threshold", "threshold", "value", "clip_val", "val")
_OFF = frozenset({"none", "null", "false", "off", ""})
_IN_TEXT = re.compile(
    rb"(?i)(?<![\w])(?:"
    + b"|".join(k.replace("_", "[_ -]").encode() for k in sorted(KEYS, key=len, reverse=True))
    + rb")"
    rb"""(?:['"]?\s{0,40}[:=]\s{0,40}|\s\.{2,80}\s{0,4})"""
    rb"(?:dict\(|\{)?\s{0,4}(?:['\"]?max_norm['\"]?\s{0,4}[:=]\s{0,4})?"
    rb"(?:" + TEXT + rb"|(None|null|False|off)\b)(?!\s*[*/(\w])"
)
_ALONE = re.compile(rb'(?:^|\s)"max_norm": ' + TEXT + rb",?\s*$")  # torchtitan's config, dumped


def in_mapping(config: Any) -> float:
    """The max_norm that a config states: inf where clipping is off, nan where it says nothing.

    >>> in_mapping({"optim": {"grad_clip": {"max_norm": 35, "norm_type": 2}}})
    35.0
    >>> in_mapping({"max_grad_norm": {"desc": None, "value": 0.5}}), in_mapping({"clip_norm": 0.0})
    (0.5, inf)
    """
    stated = set(islice(_stated(config, set(), ""), 100))
    finite = {value for value in stated if math.isfinite(value)}
    if len(finite) > 1:  # several optimizers, each with its own: none is the run's
        return math.nan
    return next(iter(finite or stated), math.nan)


def in_text(line: bytes) -> float:
    """The max_norm that one line of a log states, nan where it states none.

    >>> in_text(b"  clip_grad ............ 1.0"), in_text(b"grad_clip=dict(max_norm=35)")
    (1.0, 35.0)
    >>> in_text(b"'clip_norm': 0.0, 'sentence_avg': False"), in_text(b"clip=100.000")
    (inf, nan)
    """
    match = _IN_TEXT.search(line[: 1 << 20]) or _ALONE.search(line[:200])
    if match is None:
        return math.nan
    return math.inf if match.lastindex == 2 else _meaning(number(match[1].decode()))


def beside(log: Path) -> tuple[float, str]:
    """The max_norm that a config near `log` states, and the name of that config."""
    for folder in _near(log):
        for name in CONFIGS:
            stated = in_file(folder / name)
            if not math.isnan(stated):
                return stated, name
    return math.nan, ""


def in_file(path: Path) -> float:
    """The max_norm that a config file states, nan where it states none or cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_CONFIG:
            return math.nan
        text = path.read_bytes()
    except (OSError, ValueError):
        return math.nan
    config = _parsed(text, path.suffix)
    if config is None:
        return next((v for v in map(in_text, text.splitlines()) if not math.isnan(v)), math.nan)
    return in_mapping(config)


def _near(log: Path) -> Iterator[Path]:
    """The log's own folder; from one that runs make for their logs also the one above."""
    folder = log.parent
    yield folder
    inner = (
        "files",
        "tensorboard",
        "tb_logs",
        "tf_logs",
        "runs",
        "logs",
        "tb",
        "vis_data",
        "metrics",
    )
    if folder.name.startswith(("checkpoint-", "version_")) or folder.name in inner:
        yield folder.parent


def _parsed(text: bytes, suffix: str) -> Any:
    try:
        if suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except Exception:  # any torn or exotic config: its lines are searched instead
        return None


def _stated(node: Any, seen: set[int], parent: str) -> Iterator[float]:
    """Every statement in a nested config; `seen` stops YAML aliases from multiplying."""
    if id(node) in seen or len(seen) > 10_000:
        return
    if isinstance(node, Mapping):
        seen.add(id(node))
        if _by_value(node):
            return
        for key, value in node.items():
            name = str(key).lower().replace("-", "_").rpartition("/")[2]
            if name in KEYS or (name, parent) == ("clip", "optim"):
                yield from _value(value)
            if name == "max_norm" and parent in _SECTIONS:
                yield from _value(value)
            yield from _stated(value, seen, name)
    elif isinstance(node, list):
        seen.add(id(node))
        for item in node[:1000]:
            yield from _stated(item, seen, parent)


def _by_value(node: Mapping[Any, Any]) -> bool:
    """Whether this part of a config clips by value, so that its number is no max_norm."""
    kinds = (node.get(name) for name in _KINDS)
    return any(str(kind).lower() in ("value", "adaptive") for kind in kinds)


def _value(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        inner = next((value[name] for name in _INNER if name in value), None)
        if inner is not None and not _by_value(value):
            yield from _value(inner)
        return
    if (
        value is None
        or (isinstance(value, str) and value.strip().lower() in _OFF)
        or value is False
    ):
        yield math.inf
        return
    found = _meaning(number(value))
    if not math.isnan(found):
        yield found


def _meaning(stated: float | None) -> float:
    """0, negative and inf all switch clipping off in the frameworks that accept them."""
    if stated is None or math.isnan(stated):
        return math.nan
    return stated if 0 < stated < math.inf else math.inf
