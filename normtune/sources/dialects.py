"""How frameworks print a gradient norm on the console: one table of patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass

from normtune.sources.families import HF, UNKNOWN, Family, Value
from normtune.sources.numbers import TEXT

# A pattern that begins with its literal is searched for at the speed of memory; so the check that
# the literal is a word of its own comes after it, looking back over it.
_GRAD_NORM = rb"grad_norm(?<![\w/]grad_norm)"
_NORM = rb"norm(?<![\w./-]norm)"
_STEP = rb"step(?<!\wstep)"


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
        first_epoch: The number of the first epoch, where the step is counted within epochs.
        many: Whether a line may tell several values.
        whole: Finds step and value at once, where the step stands first; for many lines in a row.
    """

    family: Family
    needs: tuple[bytes, ...]
    value: re.Pattern[bytes]
    step: re.Pattern[bytes] | None = None
    key: str = "grad_norm"
    context: bool = False
    first_epoch: int = 0
    many: bool = False
    whole: re.Pattern[bytes] | None = None


def _before(name: str, value: Value) -> Family:
    return Family(name, "before", value)


def _line(
    family: Family,
    *needs: bytes,
    value: bytes,
    step: bytes | None = None,
    key: str = "grad_norm",
    context: bool = False,
    first_epoch: int = 0,
) -> Dialect:
    pattern = re.compile(value + TEXT)
    steps = re.compile(step) if step else None
    whole = _whole(step, pattern) if step and key and step.count(b"(\\d") != 2 else None
    return Dialect(family, needs, pattern, steps, key, context, first_epoch, not key, whole)


def _whole(step: bytes, value: re.Pattern[bytes]) -> re.Pattern[bytes] | None:
    """Step and value in one pattern; a step that must begin its line stays with single lines."""
    if b"|" in step or step.startswith(b"^"):
        return None
    return re.compile(step + rb"[^\n]*?" + value.pattern)


# The first that fits a line wins.
DIALECTS = (
    _line(
        _before("fairseq", "mean of window"),
        b"gnorm=",
        value=rb"gnorm(?<!\wgnorm)=",
        step=rb"num_updates=(\d+)",
        key="gnorm",
    ),
    _line(
        _before("ESPnet", "mean of window"),
        b"epoch:train:",
        b"grad_norm=",
        value=_GRAD_NORM + rb"=",
        step=rb"(\d+)epoch:train:\d+-(\d+)batch",
    ),
    _line(
        _before("Megatron-LM", "last of window"),
        b"grad norm:",
        b"iteration",
        value=rb"grad norm(?<!\wgrad norm):\s{0,10}",
        step=rb"iteration\s{1,20}(\d+)\s{0,4}/",
        key="grad norm",
    ),
    _line(
        _before("nanotron", "last of window"),
        b"grad_norm:",
        b"iteration:",
        value=_GRAD_NORM + rb":\s{0,10}",
        step=rb"iteration:\s{0,8}(\d+)",
    ),
    _line(
        _before("llm.c", "each step"),
        b" norm:",
        b"s:",
        value=_NORM + rb":\s{0,8}",
        step=rb"^\s{0,8}s:(\d+)\s",
        key="norm",
    ),
    _line(
        _before("llm.c", "each step"),
        b"| norm ",
        b"step",
        value=rb"\| norm\s{1,8}",
        step=rb"step\s{1,8}(\d+)/",
        key="norm",
    ),
    _line(
        _before("build-nanogpt", "each step"),
        b"norm:",
        b"step",
        value=rb"[|,\d%]\s{1,4}norm:\s{0,8}",
        step=_STEP + rb":?\s{0,8}(\d+)",
        key="norm",
    ),
    _line(
        _before("Swin Transformer", "last of window"),
        b"grad_norm ",
        b"Train: [",
        value=_GRAD_NORM + rb"\s{1,4}",
        step=rb"Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\]",
    ),
    _line(
        _before("mmcv", "mean of window"),
        b"grad_norm:",
        b"Epoch",
        value=_GRAD_NORM + rb":\s{0,8}",
        step=rb"Epoch(?:\(train\))?\s{1,4}\[(\d+)\]\[\s{0,8}(\d+)/(\d+)\]",
        first_epoch=1,
    ),
    _line(
        _before("mmcv", "mean of window"),
        b"grad_norm:",
        b"Iter",
        value=_GRAD_NORM + rb":\s{0,8}",
        step=rb"Iter(?:\(train\))?\s{1,4}\[\s{0,8}(\d+)/",
    ),
    _line(
        _before("torchtitan", "last of window"),
        b"grad_norm:",
        b"memory:",
        b"step:",
        value=_GRAD_NORM + rb":\s{0,8}",
        step=_STEP + rb":\s{0,8}(\d+)",
    ),
    _line(
        _before("torchtune", "last of window"),
        b"grad_norm:",
        b" | loss:",
        value=_GRAD_NORM + rb":",
        step=rb"Step (\d+) \|",
    ),
    _line(
        _before("verl", "mean of window"),
        b"/grad_norm:",
        b"step:",
        value=rb"([A-Za-z][\w/]{0,60}/grad_norm):\s{0,4}",
        step=_STEP + rb":(\d+) - ",
        key="",
    ),
    _line(
        _before("lingua", "last of window"),
        b" grad: ",
        b"  acc: ",
        value=rb" grad: ",
        step=_STEP + rb": (\d+)  acc: ",
    ),
    _line(
        _before("LeRobot", "mean of window"),
        b"grdn:",
        value=rb"grdn(?<!\wgrdn):\s{0,4}",
        step=_STEP + rb":(\d+(?:\.\d+)?[KMB]?)\s",
        key="grdn",
    ),
    _line(
        _before("openpi", "mean of window"),
        b"param_norm=",
        b"grad_norm=",
        b"Step ",
        value=_GRAD_NORM + rb"=",
        step=rb"Step (\d+): ",
    ),
    _line(  # AlgoPerf prints each value twice: this is the training process, clu its log writer
        Family("AlgoPerf", "unknown", "each step"),
        b"grad_norm = ",
        b") loss = ",
        value=_GRAD_NORM + rb" = ",
        step=rb"(?:^|\s)(\d+)\) loss = ",
    ),
    _line(
        Family("clu"),
        b"grad_norm=",
        b"[",
        value=rb"((?:[A-Za-z]\w{0,40}/)?grad_norm)(?<!\wgrad_norm)=",
        step=rb"\] \[(\d+)\] |(?:^|\s)\[(\d+)\] ",
        key="",
    ),
    Dialect(
        HF,
        (b"grad_norm': ",),
        re.compile(rb"grad_norm(?<=['/]grad_norm)': " + TEXT),
        many=True,
    ),
    _line(
        _before("OLMo", "last of window"),
        b"optim/total",
        value=rb"(optim/total[_ ]grad[_ ]norm)=",
        key="",
        context=True,
    ),
    _line(
        Family("MosaicML Composer", "after", "last of window"),
        b"l2_norm/grad/global",
        value=rb"(l2_norm/grad/global): ",
        key="",
        context=True,
    ),
)

CONTEXT = re.compile(rb"\[(?:step|batch)=(\d+)")
EPOCH = re.compile(rb"'epoch': '?(\d+(?:\.\d+)?)")

# Any other line that names a gradient norm: from the word norm on, then the number.
_GAP = rb"(?:['\"\])]{0,2}(?:\s{0,4}[:=]\s{0,12}|\s{1,12}))"
ANY_NORM = re.compile(
    rb"((?:[nN]orms?|NORM)(?: (?:before|after|pre|post)[ -]clip(?:ping)?)?"
    rb"[\w./@-]{0,60}|gnorm|grdn)" + _GAP + TEXT
)
# The words of its name that stand before, read up to the end of what is given.
ANY_NAME = re.compile(
    rb"(?i)((?:[a-z][\w.]{0,40} )?(?:(?:total|global|mean|avg|average|raw|unclipped|clipped"
    rb"|gradients?|grads?|l2|model|pre-?clip|post-?clip) ){0,3}[\w./@-]{0,80})$"
)
# A word before the name that says nothing of whose norm it is; any other makes it a part's norm.
NO_OWNER = re.compile(rb"(?i)(?:info|debug|warning|and|with|the|current|step|iter|of|batch) (?=.)")
_COUNT = (
    rb"s?['\"]?\s{0,3}[:=#\[(]?\s{0,8}(\d{1,15}(?:\.\d{1,3}[KM])?[KM]?)(?![\d.]{0,20}m?s\b)(?!\w)"
)
_STEP_WORDS = (
    rb"(?<![a-z_/])(?:(?:global|train|training|optimizer)[_ ]?step|step|num_update|update)",
    rb"(?<![a-z_/])(?:iteration|iter|it)",
    rb"(?<![a-z_/])(?:batch)",
)
_IN_EPOCH = re.compile(
    rb"(?:Epoch|Train|train|epoch)[^\[\n]{0,12}\[\s{0,4}(\d+)(?:/\d+)?\]\s{0,4}\[\s{0,8}(\d+)/(\d+)\]"
)
_STEP_PATTERNS = [re.compile(rb"(?i)(" + word + rb")" + _COUNT) for word in _STEP_WORDS]
ANY_STEP = (_STEP_PATTERNS[0], _IN_EPOCH, *_STEP_PATTERNS[1:])


def by_key(key: str) -> re.Pattern[bytes]:
    """Finds the value that a line gives for a key of the user's own."""
    return re.compile(rb"(?i)(?<![\w/])" + re.escape(key.encode()) + _GAP + TEXT)


def learned(key: str, name: bytes, word: bytes) -> Dialect:
    """The dialect of a log of nobody's framework: its name for the norm and its word for steps.

    Args:
        key: The key of the norm.
        name: How the line writes it.
        word: The word before the step, empty where the lines tell none.
    """
    literal, word_literal = re.escape(name), re.escape(word)
    value = re.compile(literal + rb"(?<![\w./@-]" + literal + rb")" + _GAP + TEXT)
    if not word:
        return Dialect(UNKNOWN, (name,), value, key=key)
    step = word_literal + rb"(?<![A-Za-z_/]" + word_literal + rb")" + _COUNT
    return Dialect(UNKNOWN, (name, word), value, re.compile(step), key, whole=_whole(step, value))
