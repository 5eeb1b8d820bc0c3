"""`suggest`: from norms to a max_norm with its interval, its candidates and its doubts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from normtune import format as formatting
from normtune import markup, rules, statistics
from normtune.doubts import FEWEST, Choice, doubts_about
from normtune.errors import SuggestionError
from normtune.format import number, share
from normtune.records import Finding, NormRecord
from normtune.shares import Share, largest_shares

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from normtune.rules import Rule, RuleFunction
    from normtune.statistics import Floats, Interval

    Norms = NormRecord | str | os.PathLike[str] | pd.Series[float] | Floats | list[float]

ALWAYS = ("p10", "p50", "p90", "p99", "median_multiple")
DEFAULTS = (1.0, 10.0)  # what people ask about
NORMALISES = 0.85  # share of clipped steps


@dataclass(frozen=True)
class Candidate:
    """One max_norm and what it does to the recorded norms; shares are 0 to 1.

    Attributes:
        name: ``"p90"``, ``"2 x median"``, ``"1.0"``, ``"current"`` and so on.
        max_norm: The value.
        clipped: Share of the steps that it clips, by torch's own formula.
        first_half: That share in the first half of the steps.
        second_half: That share in the second half.
        kept: Mean of min(1, max_norm / norm): "gradient kept".
        note: What is special about it; may be empty.
        suggested: Whether this is the suggestion.
    """

    name: str
    max_norm: float
    clipped: float
    first_half: float
    second_half: float
    kept: float
    note: str = ""
    suggested: bool = False


class Candidates(tuple[Candidate, ...]):
    """The candidates of a suggestion, a tuple that pandas can show."""

    __slots__ = ()

    def to_frame(self) -> pd.DataFrame:
        """A pandas DataFrame with one row a candidate, indexed by name."""
        import pandas as pd

        return pd.DataFrame([asdict(c) for c in self]).set_index("name")


@dataclass(frozen=True)
class Suggestion:
    """A max_norm with what speaks for it and against it.

    Attributes:
        max_norm: The suggestion, rounded; everything below is computed for this rounded value.
        interval: 95 % interval of the rule's value in this window. The upper end is inf where the
            sample gives none; both ends are nan for a function of the user's own.
        rule: The rule, as `suggest` takes it.
        label: The rule, as a table shows it.
        n_steps: Steps looked at, without those that a GradScaler skipped.
        n_nonfinite: How many of them had a non-finite norm.
        effective_steps: How many independent norms the finite ones are worth for this rule.
        candidates: The table; ``candidates.to_frame()`` gives a DataFrame.
        doubts: Sentences, the most serious first; the last one says what the suggestion is for.
        current: The max_norm in use today; None where there is none or it is unknown.
        optimizer: Class name of the optimizer; may be empty.
        lr: Highest learning rate in the window; nan where unknown.
        lr_last: The learning rate at its end.
        norm_type: The order of the norm.
        skipped_first: How many steps were left out at the start.
        source: The file, or ``""``.
        series: The series within it.
        notes: What was left out of the source and what else it holds.
        findings: What was found about the clip calls.
        shares: The parameters that carry the largest norms, where norms of groups were recorded.
        record: The norms that were used.
    """

    max_norm: float
    interval: Interval
    rule: str
    label: str
    n_steps: int
    n_nonfinite: int
    effective_steps: float
    candidates: Candidates
    doubts: tuple[str, ...]
    current: float | None
    optimizer: str
    lr: float
    lr_last: float
    norm_type: float
    skipped_first: int
    source: str
    series: str
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    shares: tuple[Share, ...]
    record: NormRecord = field(repr=False, compare=False)

    def __str__(self) -> str:
        return formatting.format_suggestion(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON; what is unknown or without bound is None."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "record"}
        plain["candidates"] = [asdict(c) for c in self.candidates]
        plain["findings"] = [asdict(f) for f in self.findings]
        plain["shares"] = [asdict(s) for s in self.shares]
        return {key: _json(value) for key, value in plain.items()}

    def to_frame(self) -> pd.DataFrame:
        """The candidates as a pandas DataFrame, indexed by name."""
        return self.candidates.to_frame()

    def plot(self, ax: Axes | None = None) -> Axes | tuple[Axes, Axes]:
        """Draw the norms over the steps with the suggestion, and their distribution.

        Args:
            ax: Axes for the norms over the steps; without it a new figure shows both.

        Returns:
            `ax`, or both axes of the new figure.
        """
        from normtune import plots

        return plots.plot_suggestion(self, ax=ax)

    def _repr_html_(self) -> str:
        return _html(self)


def suggest(
    norms: Norms,
    *,
    rule: str | RuleFunction | None = None,
    skip: int | str = 0,
    current: float | None = None,
    optimizer: str | None = None,
    series: str | None = None,
) -> Suggestion:
    """Suggest a max_norm from the unclipped gradient norms of a training.

    Args:
        norms: A `NormRecord`, the path of a record or of any log that `sources.read` knows, a
            pandas Series, a numpy array or a list; one norm a step, in the order of the steps.
        rule: ``"p90"`` (the default), ``"p97.5"``, ``"median_multiple:3"``, ``"pascanu:5"`` or a
            function of an array.
        skip: Steps to leave out at the start: a count, or a share such as ``"10 %"``.
        current: The max_norm in use today, to compare with; without it the record's own.
        optimizer: Class name of the optimizer; without it the record's own.
        series: Which series of a record file; without it the one with most steps.

    Returns:
        The suggestion with its interval, its candidates and its doubts.

    Raises:
        SuggestionError: If these norms cannot carry a suggestion: too few, all zero, all
            non-finite, already clipped. It is a `ValueError` too.
        RecordError: If the file cannot be read.
        ValueError: If an argument is wrong.

    >>> print(suggest([0.1 * (i % 10 + 1) for i in range(100)]).max_norm)
    0.91
    """
    chosen_rule = rules.parse(rule)
    whole = _as_record(norms, series)
    first = _skip_count(skip, len(whole))
    record = whole.skip(first) if first else whole
    finite = record.finite
    ordered = np.sort(finite)
    _refuse(record, ordered, first)
    value = chosen_rule(finite)
    effective = _effective(finite, chosen_rule)
    interval = chosen_rule.interval(finite, ordered, effective=effective)
    choice = Choice(
        max_norm=statistics.round_threshold(ordered, value, within=interval),
        rule=chosen_rule,
        interval=interval,
        effective=effective,
        current=_current(current, record),
        optimizer=_optimizer(optimizer, record),
        skipped_first=first,
    )
    return _assemble(record, choice, ordered)


def _assemble(record: NormRecord, choice: Choice, ordered: Floats) -> Suggestion:
    lr = record.lr[np.isfinite(record.lr)]
    initial = _number(record.metadata.get("lr_initial"))
    taken = int((~record.skipped).sum())
    return Suggestion(
        max_norm=choice.max_norm,
        interval=choice.interval,
        rule=choice.rule.name,
        label=choice.rule.label,
        n_steps=taken,
        n_nonfinite=taken - len(ordered),
        effective_steps=choice.effective,
        candidates=_candidates(record.finite, ordered, choice),
        doubts=doubts_about(record, choice),
        current=choice.current if math.isfinite(choice.current) else None,
        optimizer=choice.optimizer,
        lr=float(lr.max()) if len(lr) else initial,
        lr_last=float(lr[-1]) if len(lr) else initial,
        norm_type=_number(record.metadata.get("norm_type", 2.0)),
        skipped_first=choice.skipped_first,
        source=record.origin.path,
        series=record.series,
        notes=record.origin.notes,
        findings=record.findings,
        shares=largest_shares(record),
        record=record,
    )


# --- what comes in ---------------------------------------------------------------------------


def _as_record(norms: object, series: str | None) -> NormRecord:
    if isinstance(norms, NormRecord):
        if series not in (None, norms.series):
            message = f"this record holds the series {norms.series!r} but {series!r} was asked for"
            raise ValueError(message)
        return norms
    if isinstance(norms, str | os.PathLike):
        from normtune import sources

        return sources.read(norms, series=series)
    if isinstance(norms, bytes | Mapping | set) or norms is None:
        message = (
            "norms must be a NormRecord, a path, a pandas Series, an array or a list of numbers "
            f"but got {type(norms).__name__}"
        )
        raise ValueError(message)
    return NormRecord.of(_numbers(norms))


def _numbers(norms: Any) -> Floats:
    """The values as float64; text that only looks like numbers is refused."""
    if hasattr(norms, "to_numpy"):
        values = norms.to_numpy(dtype=object, na_value=math.nan)
    elif hasattr(norms, "detach"):
        values = norms.detach().cpu().numpy()
    else:
        try:
            values = np.asarray(norms)
        except ValueError:  # a ragged list
            values = np.asarray(list(norms), dtype=object)
    bad = _not_number(values)
    if bad:
        message = f"norms must be real numbers but got {bad}; check the column or list"
        raise ValueError(message)
    return np.asarray(values, dtype=np.float64)


def _not_number(values: np.ndarray[Any, Any]) -> str:
    if values.dtype.kind in "iuf":
        return ""
    if values.dtype.kind != "O":
        first = repr(values.flat[0].item()) if values.size else "none"
        return "an empty list" if not values.size else f"{values.dtype} such as {first}"
    real = (int, float, np.integer, np.floating)
    for value in values.flat:
        if value is not None and (not isinstance(value, real) or isinstance(value, bool)):
            return f"{type(value).__name__} such as {str(value)[:40]!r}"
    return ""


def _skip_count(skip: object, n: int) -> int:
    text = str(skip).strip()
    percent = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text)
    if percent and float(percent[1]) < 100:
        return int(float(percent[1]) * n / 100)
    plain = not isinstance(skip, bool | float)
    if plain and re.fullmatch(r"[0-9]+", text):
        return int(text)
    message = f"skip must be a count of steps or a share such as '10 %' but got {skip!r}"
    raise ValueError(message)


def _current(current: object, record: NormRecord) -> float:
    if current is None:
        return math.nan if record.current is None else record.current
    if isinstance(current, bool | str) or not _number(current) > 0:
        message = f"current must be a max_norm above 0 but got {current!r}"
        raise ValueError(message)
    return _number(current)


def _optimizer(optimizer: object, record: NormRecord) -> str:
    if optimizer is None:
        return str(record.metadata.get("optimizer", ""))
    return optimizer if isinstance(optimizer, str) else type(optimizer).__name__


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


# --- what cannot be used ---------------------------------------------------------------------


def _refuse(record: NormRecord, ordered: Floats, first: int) -> None:
    """Raise where no max_norm can be told from these norms."""
    reason = _blocked(record) or _unusable(record, ordered, first) or _already_clipped(ordered)
    if reason:
        raise SuggestionError(reason)


def _blocked(record: NormRecord) -> str:
    if record.origin.clip_side == "after":
        return (
            f"a suggestion needs norms from before clipping but {_place(record)} holds them from "
            "after it; log the value that clip_grad_norm_ returns, or record with normtune"
        )
    blocking = next((f for f in record.findings if f.blocks), None)
    return f"these norms cannot carry a suggestion: {blocking.text}" if blocking else ""


def _unusable(record: NormRecord, finite: Floats, first: int) -> str:
    taken = int((~record.skipped).sum())
    after = f" after the first {first} were left out" if first else ""
    if taken >= FEWEST and not len(finite):
        return (
            f"a suggestion needs at least {FEWEST} finite norms but all {taken} are inf or nan: "
            "the run diverged at once, or the gradients overflow; lower the learning rate"
        )
    if len(finite) < FEWEST:
        others = f" ({taken - len(finite)} more were inf or nan)" if taken > len(finite) else ""
        return (
            f"a suggestion needs at least {FEWEST} finite norms but got {len(finite)}{others}"
            f"{after}; record more steps"
        )
    if float(finite[0]) < 0:
        where = int(record.steps[np.flatnonzero(record.norms < 0)[0]])
        return (
            f"a norm is never negative but step {where} holds {number(float(finite[0]))}; "
            "check that this column holds gradient norms"
        )
    if not finite.any():
        return (
            f"a suggestion needs norms above 0 but all {len(finite)} are 0: no gradient reached "
            "the optimizer, or the log prints too few digits"
        )
    return ""


def _already_clipped(ordered: Floats) -> str:
    pile = statistics.pile_up(ordered)
    if pile is None:
        return ""
    return (
        f"a suggestion needs norms from before clipping, but {share(pile.share)} of these "
        f"{len(ordered)} lie at {number(pile.value, 5)}: they look already clipped (or are "
        "printed with too few digits). Log the value that clip_grad_norm_ returns, or record with "
        'NormRecorder(..., measure="backward") where the loop clips by its own arithmetic'
    )


def _place(record: NormRecord) -> str:
    where = record.origin.path or "this record"
    return formatting.clean(f"{where} ({record.origin.key})" if record.origin.path else where)


# --- the table -------------------------------------------------------------------------------


def _effective(finite: Floats, rule: Rule) -> float:
    p = 50.0 if math.isnan(rule.percentile) else rule.percentile
    return statistics.effective_size(finite, p)


def _candidates(finite: Floats, ordered: Floats, choice: Choice) -> Candidates:
    rows = []
    for rule in _shown_rules(choice.rule):
        chosen = rule.name == choice.rule.name
        value = choice.max_norm if chosen else _rounded_value(rule, ordered)
        if value > 0:
            rows.append(_candidate(finite, rule.label, value, suggested=chosen))
    for default in DEFAULTS:
        note = "current, common default" if default == choice.current else "common default"
        rows.append(_candidate(finite, f"{default:.1f}", default, note=note))
    if math.isfinite(choice.current) and choice.current not in DEFAULTS:
        rows.append(_candidate(finite, "current", choice.current, limit=True))
    return Candidates(rows)


def _shown_rules(chosen: Rule) -> list[Rule]:
    shown = [rules.parse(name) for name in ALWAYS]
    shown = [chosen if rule.label == chosen.label else rule for rule in shown]
    if chosen not in shown:
        shown.append(chosen)
    return sorted(shown, key=_row)


def _row(rule: Rule) -> tuple[int, float]:
    """Percentiles in their order first, then the rest as they come."""
    plain = not math.isnan(rule.percentile) and rule.name.startswith("p")
    return (0, rule.percentile) if plain else (1, 0.0)


def _rounded_value(rule: Rule, ordered: Floats) -> float:
    value = rule.function(ordered)
    return statistics.round_threshold(ordered, value) if value > 0 else 0.0


def _candidate(
    finite: Floats,
    name: str,
    value: float,
    *,
    note: str = "",
    suggested: bool = False,
    limit: bool = False,
) -> Candidate:
    effect = statistics.clip_effect(finite, value)
    parts = [note] if note else []
    if effect.share == 0:
        parts.append("same as no clipping here")
    elif effect.share >= 0.5 and (limit or note.startswith("current")):
        parts.append("a step-size limit, not a guard")
    elif effect.share >= NORMALISES:
        parts.append(
            "normalises every step" if effect.share == 1 else "normalises nearly every step"
        )
    return Candidate(
        name=name,
        max_norm=value,
        clipped=effect.share,
        first_half=effect.first_half,
        second_half=effect.second_half,
        kept=effect.kept,
        note="; ".join(parts),
        suggested=suggested,
    )


# --- other shapes ----------------------------------------------------------------------------


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return value


def _html(suggestion: Suggestion) -> str:
    *doubts, closing = suggestion.doubts
    value, head = number(suggestion.max_norm, 8), markup.text(formatting.headline(suggestion))
    paste = "\n".join(map(markup.text, formatting.paste_lines(suggestion)))
    return (
        f"<p><b>suggested max_norm {value}</b>: {head}</p>"
        f"{markup.table((*formatting.HEADINGS, ''), formatting.table_rows(suggestion))}"
        f"{markup.points(doubts)}<p>{markup.text(closing)}</p><pre>{paste}</pre>"
    )
