"""How frameworks print a gradient norm on the console: one table of patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass

from normtune.sources.families import HF, ClipSide, Family, Value
from normtune.sources.numbers import TEXT


@dataclass(frozen=True)
class Dialect:
    """One framework's line.

    Attributes:
        family: The framework, its side of clipping and what its value stands for.
        needs: Literals that the line holds, the rarest first.
        value: Finds the value (last group), and the key where that is not fixed (first of two).
        step: Finds the step: one group, or epoch and iteration, or those and the length of an
            epoch; None where the line holds no step. A line without it is another dialect's.
        key: The key, where the line's own is too short to say what it is.
        context: Whether the step stands on a line before, as ``[step=12/100]``.
    """

    family: Family
    needs: tuple[bytes, ...]
    value: re.Pattern[bytes]
    step: re.Pattern[bytes] | None = None
    key: str = ""
    context: bool = False


def _dialect(
    name: str,
    side: ClipSide,
    value: Value,
    needs: tuple[bytes, ...],
    pattern: bytes,
    step: bytes | None,
    *,
    key: str = "grad_norm",
    context: bool = False,
) -> Dialect:
    return Dialect(
        Family(name, side, value),
        needs,
        re.compile(pattern + TEXT),
        re.compile(step) if step else None,
        key,
        context,
    )


LAST: Value = "last of window"
MEAN: Value = "mean of window"

# The first that fits a line wins.
DIALECTS = (
    _dialect("fairseq", "before", MEAN, (b"gnorm=",), rb"(?<!\w)gnorm=", rb"num_updates=(\d+)", key="gnorm"),
    _dialect("ESPnet", "before", MEAN, (b"epoch:train:", b"grad_norm="), rb"(?<!\w)grad_norm=",
             rb"(\d+)epoch:train:\d+-(\d+)batch"),
    _dialect("Megatron-LM", "before", LAST, (b"grad norm:", b"iteration"), rb"(?<!\w)grad norm:\s{0,10}",
             rb"iteration\s{1,20}(\d+)\s{0,4}/", key="grad norm"),
    _dialect("nanotron", "before", LAST, (b"grad_norm:", b"iteration:"), rb"(?<![\w/])grad_norm:\s{0,10}",
             rb"iteration:\s{0,8}(\d+)"),
    _dialect("llm.c", "before", "each step", (b" norm:", b"s:"), rb"(?<![\w/.-])norm:\s{0,8}", rb"^\s{0,8}s:(\d+)\s",
             key="norm"),
    _dialect("llm.c", "before", "each step", (b"| norm ", b"step"), rb"\| norm\s{1,8}", rb"step\s{1,8}(\d+)/",
             key="norm"),
    _dialect("build-nanogpt", "before", "each step", (b"norm:", b"step"), rb"(?<![\w./-])(?<!grad )norm:\s{0,8}",
             rb"(?<![\w])step:?\s{0,8}(\d+)", key="norm"),
    _dialect("Swin Transformer", "before", LAST, (b"grad_norm ", b"Train: ["), rb"(?<!\w)grad_norm\s{1,4}",
             rb"Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\]"),
    _dialect("mmcv", "before", MEAN, (b"grad_norm:", b"Epoch"), rb"(?<![\w/])grad_norm:\s{0,8}",
             rb"Epoch(?:\(train\))?\s{1,4}\[(\d+)\]\[\s{0,8}(\d+)/(\d+)\]"),
    _dialect("mmcv", "before", MEAN, (b"grad_norm:", b"Iter"), rb"(?<![\w/])grad_norm:\s{0,8}",
             rb"Iter(?:\(train\))?\s{1,4}\[\s{0,8}(\d+)/"),
    _dialect("torchtitan", "before", LAST, (b"grad_norm:", b"memory:", b"step:"), rb"(?<![\w/])grad_norm:\s{0,8}",
             rb"(?<!\w)step:\s{0,8}(\d+)"),
    _dialect("torchtune", "before", LAST, (b"grad_norm:", b"Step ", b" | "), rb"(?<![\w/])grad_norm:\s{0,8}",
             rb"Step (\d+) \|"),
    _dialect("verl", "before", MEAN, (b"/grad_norm:", b"step:"), rb"([\w/]{1,60}/grad_norm):\s{0,4}",
             rb"(?<![\w/])step:(\d+) - ", key=""),
    _dialect("lingua", "before", LAST, (b" grad: ", b"  acc: "), rb"(?<!\w)grad: ", rb"(?<!\w)step: (\d+)  acc: "),
    _dialect("LeRobot", "before", MEAN, (b"grdn:",), rb"(?<!\w)grdn:\s{0,4}", rb"(?<!\w)step:(\d+(?:\.\d+)?[KMB]?)\s",
             key="grdn"),
    _dialect("openpi", "before", MEAN, (b"grad_norm=", b"Step "), rb"(?<![\w/])grad_norm=", rb"Step (\d+): "),
    _dialect("AlgoPerf", "unknown", "each step", (b"grad_norm = ", b") loss = "), rb"(?<![\w/])grad_norm = ",
             rb"(?:^|\s)(\d+)\) loss = "),
    _dialect("clu", "unknown", "unknown", (b"grad_norm=", b"["), rb"(?<![\w/])((?:[\w/]{1,40}/)?grad_norm)=",
             rb"\] \[(\d+)\] |(?:^|\s)\[(\d+)\] ", key=""),
    Dialect(HF, (b"grad_norm': ",), re.compile(rb"'(?:train/)?grad_norm': " + TEXT), None, "grad_norm"),
    _dialect("OLMo", "before", LAST, (b"optim/total",), rb"(optim/total[_ ]grad[_ ]norm)=", None, key="",
             context=True),
    _dialect("MosaicML Composer", "after", LAST, (b"l2_norm/grad/global",), rb"(l2_norm/grad/global): ", None,
             key="", context=True),
)  # fmt: skip

CONTEXT = re.compile(rb"\[(?:step|batch)=(\d+)")
EPOCH = re.compile(rb"'epoch': '?(\d+(?:\.\d+)?)")

# Any other line that names a gradient norm: the word norm, then the number; `before` reads the name backwards.
ANY_NORM = re.compile(
    rb"(?i)(norms?(?: (?:before|after|pre|post)[ -]clip(?:ping)?)?[\w./@-]{0,60}|gnorm|grdn|l2_grads)"
    rb"['\"\])]{0,2}(?:\s{0,4}[:=]\s{0,12}|\s{1,12})" + TEXT
)
ANY_NAME = re.compile(
    rb"(?i)((?:(?:total|global|mean|avg|average|raw|unclipped|clipped|gradients?|grads?|l2|model|pre-?clip"
    rb"|post-?clip)[ ]){0,3}[\w./@-]{0,80})$"
)
_WORD = rb"(?i)(?<![a-z_/])(?:%s)s?['\"]?\s{0,3}[:=#\[(]?\s{0,8}(\d{1,15}(?:\.\d{1,3}[KM])?[KM]?)(?![\d.]{0,20}m?s\b)"
ANY_STEP = (
    re.compile(_WORD % rb"global[_ ]?step|train[_ ]?step|training[_ ]?step|step|num_update|update|optimizer[_ ]?step"),
    re.compile(rb"(?:Epoch|Train|train|epoch)[^\[\n]{0,12}\[\s{0,4}(\d+)(?:/\d+)?\]\s{0,4}\[\s{0,8}(\d+)/(\d+)\]"),
    re.compile(_WORD % rb"iteration|iter|it"),
    re.compile(_WORD % rb"batch"),
)


def by_key(key: str) -> re.Pattern[bytes]:
    """Finds the value that a line gives for a key of the user's own."""
    name = re.escape(key.encode())
    return re.compile(rb"(?i)(?<![\w/])" + name + rb"['\"\])]{0,2}(?:\s{0,4}[:=]\s{0,12}|\s{1,12})" + TEXT)
