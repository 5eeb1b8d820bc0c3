"""`SearchResult`: what a search found, as values and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from normtune import markup, records
from normtune.comparison import ArmRow, Verdict
from normtune.format import count, number
from normtune.fresh import Margin
from normtune.trials import Settings, Trial

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        name: The name of the Optuna study.
        storage: Its storage, without a password.
        verdict: The comparison of the arms over fresh seeds, with its sentence.
        suggestion: The suggestion from the unclipped warm-up, as `Suggestion.to_dict` gives it.
        settings: What the search was fixed to.
        trials: Every training, free ones included.
        notes: What happened on the way: reuse switched off, crashes.
        why_ended: Why no more runs were planned.
    """

    name: str
    storage: str
    verdict: Verdict
    suggestion: Mapping[str, Any]
    settings: Settings
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]
    why_ended: str

    def __str__(self) -> str:
        return format_result(self)

    def _repr_html_(self) -> str:
        return _html(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw validation values over max_norm: seeds, arms, free and failed runs.

        Args:
            ax: Where to draw; a new figure without it.

        Returns:
            `ax`, or the axes of the new figure.
        """
        from normtune import plots

        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(7.0, 5.0), layout="constrained")[1]
        return plots.plot_losses(self, ax)

    def to_frame(self) -> pd.DataFrame:
        """A pandas DataFrame with one row a training."""
        import pandas as pd

        return pd.DataFrame([asdict(trial) for trial in self.trials])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; non-finite numbers are strings."""
        plain: dict[str, Any] = records.strict(
            {
                "study": self.name,
                "storage": self.storage,
                "verdict": self.verdict.to_dict(),
                "suggestion": dict(self.suggestion),
                "settings": asdict(self.settings),
                "trials": [asdict(trial) for trial in self.trials],
                "notes": self.notes,
                "why_ended": self.why_ended,
            }
        )
        return plain


def format_result(result: SearchResult) -> str:
    """The table of arms, the sentence, and what it says of the suggestion."""
    verdict = result.verdict
    lines = [runs_line(result), result.why_ended, ""]
    lines += [*_table((*verdict.arms, *verdict.explored)), ""]
    lines += [verdict.sentence, about_suggestion(result)]
    lines += [f"  - {note}" for note in points(result)]
    return "\n".join(line.rstrip() for line in lines)


def _html(result: SearchResult) -> str:
    verdict = result.verdict
    head = markup.text(runs_line(result))
    table = markup.table(HEADER, [row(arm) for arm in (*verdict.arms, *verdict.explored)])
    said = f"<p><b>{markup.text(verdict.sentence)}</b></p>"
    about = f"<p>{markup.text(about_suggestion(result))}</p>"
    return f"<p>{head}</p>{said}{about}{table}{markup.points(points(result))}"


def points(result: SearchResult) -> tuple[str, ...]:
    """What is to be known beside the sentence: the margin, the verdict's notes, the search's."""
    verdict = result.verdict
    return tuple(filter(None, (margin_words(verdict.margin), *verdict.notes, *result.notes)))


def margin_words(margin: Margin) -> str:
    """What counts as equal, in loss units, percent and sd; empty where it is not known yet."""
    if not math.isfinite(margin.loss):
        return ""
    size = f"{number(margin.loss)}, which is {number(margin.percent)} %"
    sd = f"{number(margin.sd)} sd of a single run" if math.isfinite(margin.sd) else "no sd known"
    whose = f"yours; {sd}" if margin.source == "user" else margin.source
    return f"what counts as equal: within {size} ({whose})"


def runs_line(result: SearchResult) -> str:
    """How many trainings there were, how long they took, and how many failed."""
    ended = [t for t in result.trials if not t.free and t.state != "running"]
    free = sum(t.free for t in result.trials)
    failed = sum(t.state in ("diverged", "stuck") for t in ended)
    crashed = sum(t.state == "crashed" for t in ended)
    seconds = sum(t.seconds for t in ended if math.isfinite(t.seconds))
    took = f"{number(seconds)} s" if seconds < 120 else f"{number(seconds / 60)} minutes"
    parts = [f"study {result.name}: {count(len(ended), 'training')}, {took} in all"]
    named = ((free, "more copied from them"), (failed, "failed"), (crashed, "crashed"))
    return ", ".join([*parts, *(f"{n} {what}" for n, what in named if n)])


HEADER = ("arm", "max_norm", "rate", "clipped", "failed", "value", "sd", "against no clipping")


def _table(arms: Sequence[ArmRow]) -> list[str]:
    rows = [HEADER, *(row(arm) for arm in arms)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i in (0, len(HEADER) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def row(arm: ArmRow) -> tuple[str, ...]:
    """The cells of an arm, as `HEADER` names them."""
    return (
        arm.label,
        number(arm.max_norm) if math.isfinite(arm.max_norm) else "none",
        f"{number(arm.lr_factor)}x",
        f"{100 * arm.clip_share:.0f} %" if math.isfinite(arm.clip_share) else "",
        _failed(arm),
        _figure(arm.mean),
        _figure(arm.sd),
        _against_none(arm),
    )


def _failed(arm: ArmRow) -> str:
    if not arm.seeds:
        return "1 of 1" if arm.failed else ""
    free = f" ({arm.free} free)" if arm.free else ""
    return f"{arm.failed} of {arm.seeds}{free}"


def _against_none(arm: ArmRow) -> str:
    if arm.free and arm.free >= arm.seeds:
        return "same as no clipping" + (" on one seed" if not arm.seeds else "")
    if not arm.seeds:
        return _on_one_seed(arm)
    if not math.isfinite(arm.delta):
        return ""
    ends = f" ({arm.delta_low:+.3g} to {arm.delta_high:+.3g})"
    return f"{arm.delta:+.3g}" + (ends if math.isfinite(arm.delta_low) else "")


def _on_one_seed(arm: ArmRow) -> str:
    if math.isfinite(arm.delta):
        return f"{arm.delta:+.3g} on one seed only"
    return "one seed only" if arm.failed or math.isfinite(arm.mean) else "not tried"


def _figure(value: float) -> str:
    return number(value, 4) if math.isfinite(value) else ""


WORDS = {
    "helps": "helps against no clipping",
    "hurts": "hurts against no clipping",
    "equal": "is equal to no clipping",
    "undecided": "against no clipping is undecided",
}
WORDS_BEST = {
    "best": "is the best value found",
    "as good": "is as good as the best value found",
    "worse": "is worse than the best value found",
    "undecided": "against the best value found is undecided",
}
WORDS_CURRENT = {
    "better": "better than",
    "worse": "worse than",
    "equal": "equal to",
    "undecided": "undecided against",
}


def about_suggestion(result: SearchResult) -> str:
    """What the verdict says of the suggestion: against no clipping, the best and the current."""
    verdict, settings = result.verdict, result.settings
    if not any("suggestion" in arm.label for arm in verdict.arms):
        within = "" if verdict.kind == "none" else " within this budget: nothing is said of it"
        return f"the suggestion {number(settings.suggestion)} had no fresh seeds{within}"
    vs_best = WORDS_BEST[verdict.suggestion_vs_best]
    best = "" if verdict.suggestion_vs_best == "best" else f" ({number(verdict.best)})"
    text = (
        f"the suggestion {number(settings.suggestion)} "
        f"{WORDS[verdict.suggestion_vs_none]}, and {vs_best}{best}"
    )
    if verdict.suggestion_vs_current and settings.current is not None:
        word = WORDS_CURRENT[verdict.suggestion_vs_current]
        text += f"; {word} the loop's own {number(settings.current)}"
    return text
