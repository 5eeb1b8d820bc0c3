"""What a report says: an answer, and sections of sentences, tables, code and pictures."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from normtune import __version__, plots, results
from normtune import format as formatting
from normtune.doubts import is_adaptive
from normtune.format import clean, count, number, share
from normtune.trials import Trial

if TYPE_CHECKING:
    from normtune.pictures import Draw
    from normtune.records import NormRecord
    from normtune.results import SearchResult
    from normtune.suggestion import Suggestion

MOST_POINTS = 30  # sentences of one list
MOST_TRIALS = 200  # rows of the table of trainings
LONGEST = 300  # characters of a name or a sentence that comes from a file


@dataclass(frozen=True)
class Table:
    """Cells of text; the first cell of a row names it.

    Attributes:
        caption: What the table holds.
        head: The headings; empty for a list of facts.
        rows: The rows, each as long as `head`.
        marked: The number of the row to point at; -1 for none.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int = -1


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn only where a form can show it.

    Attributes:
        name: A short name, for ids.
        caption: How to read it.
        alt: What it shows, in words.
        draw: Draws it on axes.
        large: Whether it has a row of its own.
    """

    name: str
    caption: str
    alt: str
    draw: Draw
    large: bool = False


@dataclass(frozen=True)
class Section:
    """One heading and what stands below it, in this order."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    aside: tuple[str, ...] = ()  # beside the pictures, where there is room
    table: Table | None = None
    points: tuple[str, ...] = ()
    closing: str = ""
    code: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    """A report before it has a form.

    Attributes:
        title: What it is about.
        answer: The answer at a glance.
        lead: What the answer stands on, one paragraph each.
        sections: The rest.
        data: The same as plain values, for JSON.
    """

    title: str
    answer: str
    lead: tuple[str, ...]
    sections: tuple[Section, ...]
    data: Mapping[str, Any]


def of_suggestion(
    suggestion: Suggestion, *, command: str = "", earlier: Sequence[NormRecord] = ()
) -> Content:
    """The report on a suggestion.

    Args:
        suggestion: What `suggest` gave.
        command: The command that makes the report again; one for its source without.
        earlier: Earlier starts of the same run, for the picture.
    """
    s = suggestion
    command = command or f"normtune suggest {s.source or 'SOURCE'} --rule {s.rule}"
    name = _name(PurePath(s.source).name) if s.source else "these norms"
    facts = _facts_of_run(s)
    return Content(
        title=f"max_norm for {name}",
        answer=f"suggested max_norm {number(s.max_norm, 8)}",
        lead=(formatting.headline(s) + ".", _effect_words(s)),
        sections=(
            Section("The norms", pictures=_pictures(s, earlier), aside=_what_it_does(s)),
            *_suggestion_sections(s),
            Section("In your code", code=formatting.paste_lines(s)),
            Section("The run", table=Table("What is known of the run", (), facts)),
            _again(command, s.record),
        ),
        data={"suggestion": s.to_dict(), **_made_with(command, s.record)},
    )


def of_result(
    result: SearchResult, *, command: str = "", suggestion: Suggestion | None = None
) -> Content:
    """The report on a study.

    Args:
        result: What the search found.
        command: The command that makes the report again; without it none is named.
        suggestion: The suggestion with the norms that it comes from, where they are still there.
    """
    name = _name(result.name)
    sentence = clean(result.verdict.sentence)
    about = results.about_suggestion(result)
    record = suggestion.record if suggestion else None
    return Content(
        title=f"study {name}: what clipping does for the validation value",
        answer=sentence.partition(":")[0],
        lead=(sentence, f"{about[0].upper()}{about[1:]}."),
        sections=(
            _arms_section(result),
            _stored_suggestion(result, suggestion),
            *(_suggestion_sections(suggestion) if suggestion else ()),
            _values_to_paste(result),
            _trials_section(result),
            Section("How it was searched", table=_facts_of_search(result)),
            _again(command, record),
        ),
        data={"result": result.to_dict(), **_made_with(command, record)},
    )


# --- the suggestion ----------------------------------------------------------------------------


def _suggestion_sections(s: Suggestion) -> tuple[Section, ...]:
    *doubts, closing = s.doubts
    chosen = [c.suggested for c in s.candidates].index(True)
    rows = tuple(formatting.table_rows(s))
    table = Table("What each max_norm does to these steps", (*formatting.HEADINGS, "note"), rows)
    return (
        Section("Candidates", table=_mark(table, chosen)),
        Section("Doubts", points=_points(doubts), closing=_name(closing)),
    )


def _mark(table: Table, row: int) -> Table:
    return Table(table.caption, table.head, table.rows, row)


def _effect_words(s: Suggestion) -> str:
    chosen = next(c for c in s.candidates if c.suggested)
    return (
        f"It clips {share(chosen.clipped)} of these steps; {chosen.kept:.2f} of the gradient is "
        "kept on average."
    )


def _what_it_does(s: Suggestion) -> tuple[str, ...]:
    if is_adaptive(s.optimizer):
        return (WHAT_IT_DOES, WHAT_KEPT_IS, f"Under {_name(s.optimizer)} {WITH_ADAM}")
    if "SGD" in s.optimizer:
        return (WHAT_IT_DOES, WHAT_KEPT_IS, WITH_SGD)
    return (WHAT_IT_DOES, WHAT_KEPT_IS)


WHAT_IT_DOES = (
    "clip_grad_norm_ takes the norm of all gradients as one vector and, where it is above "
    "max_norm, multiplies all of them by max_norm / norm: the direction stays, the length is "
    "limited. It belongs after backward() and before step()."
)
WHAT_KEPT_IS = '"Gradient kept" is the mean of min(1, max_norm / norm).'
WITH_ADAM = (
    "the gradient's scale is divided out again, so the step itself hardly shrinks: clipping makes "
    "a spike count less in the steps after it."
)
WITH_SGD = (
    "Under SGD clipping is a learning rate that is lowered for the big gradients only, and "
    '"gradient kept" is by how much on average. Where every step is clipped, only lr x max_norm '
    "counts."
)


def _pictures(s: Suggestion, earlier: Sequence[NormRecord] = ()) -> tuple[Picture, ...]:
    finite = s.record.finite
    span = f"{number(float(finite.min()))} to {number(float(finite.max()))}"
    chosen = next(c for c in s.candidates if c.suggested)
    value = number(s.max_norm, 8)
    pictures = [
        Picture(
            "norms",
            "Norms before clipping, step by step. The line is the suggestion; steps above it "
            "would be clipped.",
            f"Gradient norms of {count(s.n_steps, 'step')}, from {span}, on a logarithmic axis. "
            f"{share(chosen.clipped)} of them lie above the suggested {value}"
            + (f"; {s.n_nonfinite} are not finite." if s.n_nonfinite else "."),
            partial(plots.plot_norms, s, earlier=tuple(earlier)),
        ),
        Picture(
            "distribution",
            "How often which norm occurred, with percentiles and the values that people ask "
            "about, 1 and 10.",
            f"Histogram of the norms: median {number(float(np.median(finite)))}, p90 "
            f"{number(float(np.percentile(finite, 90)))}, largest {number(float(finite.max()))}.",
            partial(plots.plot_distribution, s),
        ),
        Picture(
            "effect",
            "What each max_norm would do to these steps: how many it clips, and how much of the "
            "gradient is left on average.",
            f"Two curves over max_norm. At {value}, {share(chosen.clipped)} of the steps are "
            f"clipped and {chosen.kept:.2f} of the gradient is kept.",
            partial(plots.plot_effect, s),
        ),
    ]
    if s.record.groups:
        pictures.append(_groups_picture(s.record))
    return tuple(pictures)


def _groups_picture(record: NormRecord) -> Picture:
    shares = plots.group_shares(record)
    means = {k: float(np.nanmean(v)) for k, v in shares.items() if np.isfinite(v).any()}
    top = max(means, key=lambda name: means[name]) if means else ""
    words = f" The largest is {_name(top)} with {share(means[top])} on average." if top else ""
    return Picture(
        "groups",
        "Which parameters the norm comes from.",
        f"Heat map of the shares of {count(len(shares), 'group')} over the steps.{words}",
        partial(plots.plot_groups, record),
    )


def _facts_of_run(s: Suggestion) -> tuple[tuple[str, str], ...]:
    record = s.record
    known = record.metadata
    rate = formatting.rate(s).removeprefix("lr ")
    facts = [
        ("source", s.source or "values from memory"),
        ("kind", record.origin.kind),
        ("series", "" if s.series == "norm" else s.series),
        ("column", "" if record.origin.key == "norm" else record.origin.key),
        ("started", known.get("time", "")),
        ("learning rate", rate),
        (
            "steps",
            f"{s.n_steps}" + (f", first {s.skipped_first} left out before" * bool(s.skipped_first)),
        ),
        ("not finite", str(s.n_nonfinite)),
        ("skipped by the GradScaler", str(int(record.skipped.sum()) or "")),
        ("current max_norm", "" if s.current is None else number(s.current, 8)),
        ("norm_type", number(s.norm_type)),
        *((words, known.get(key, "")) for key, words in KNOWN.items()),
        *(("note", note) for note in s.notes[:MOST_POINTS]),
    ]
    return tuple((name, _name(value)) for name, value in facts if value not in ("", None))


KNOWN = {
    "parameters": "scalars trained",
    "tensors": "tensors",
    "dtype": "dtype",
    "world_size": "processes",
    "torch": "torch of the run",
}


# --- the study ---------------------------------------------------------------------------------


def _arms_section(result: SearchResult) -> Section:
    verdict = result.verdict
    rows = tuple(results.row(arm) for arm in (*verdict.arms, *verdict.explored))
    caption = "The arms, over fresh paired seeds" if verdict.arms else "What one seed says"
    table = Table(caption, results.HEADER, rows)
    ended = [t for t in result.trials if t.ended]
    values = [t.value for t in ended if t.state == "finished" and t.value is not None]
    span = f" from {number(min(values), 4)} to {number(max(values), 4)}" if values else ""
    failed = sum(t.state != "finished" for t in ended)
    picture = Picture(
        "losses",
        "Every training: hollow marks explored on one seed, dots are fresh seeds, and each filled "
        "mark is the mean of an arm, with the interval of its difference to no clipping.",
        f"Validation values of {count(len(values), 'training')}{span} over max_norm, those "
        f"without clipping beside them; {failed} failed. {clean(verdict.sentence)}",
        partial(plots.plot_losses, result),
        large=True,
    )
    return Section(
        "The arms",
        pictures=(picture,) if ended else (),
        table=table,
        points=_points(results.points(result)),
    )


def _stored_suggestion(result: SearchResult, suggestion: Suggestion | None) -> Section:
    if suggestion is not None:
        lead = f"Suggested max_norm {number(suggestion.max_norm, 8)}: "
        text = (lead + formatting.headline(suggestion) + ".", _effect_words(suggestion))
        drawn, aside = _pictures(suggestion), _what_it_does(suggestion)
        return Section("The suggestion", paragraphs=text, pictures=drawn, aside=aside)
    plain = result.suggestion
    label = clean(plain.get("label", "the rule"))
    text_ = f"Suggested max_norm {number(result.settings.suggestion, 8)}: {label} of the warm-up"
    doubts = [str(doubt) for doubt in plain.get("doubts") or ()]
    return Section("The suggestion", paragraphs=(f"{text_}.",), points=_points(doubts))


def _values_to_paste(result: SearchResult) -> Section:
    """The suggestion, and the best value found where it is another."""
    verdict, suggestion = result.verdict, result.settings.suggestion
    values = {"the suggestion": suggestion}
    if verdict.kind != "none" and verdict.suggestion_vs_best != "best":
        values["the best value found"] = verdict.best
    call = "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm="
    code = tuple(f"{call}{number(v, 6)})  # {what}" for what, v in values.items())
    return Section("In your code", code=code)


def _trials_section(result: SearchResult) -> Section:
    head = (
        "max_norm",
        "lr factor",
        "seed",
        "stage",
        "value",
        "state",
        "clipped",
        "kept",
        "seconds",
    )
    rows = tuple(_trial(t) for t in result.trials[:MOST_TRIALS])
    rest = len(result.trials) - len(rows)
    closing = f"{rest} more are in the JSON form." if rest else ""
    return Section("Every training", table=Table("In order", head, rows), closing=closing)


def _trial(t: Trial) -> tuple[str, ...]:
    return (
        number(t.max_norm, 4) if math.isfinite(t.max_norm) else "none",
        number(t.lr_factor),
        str(t.seed),
        t.stage,
        "" if t.value is None else number(t.value, 5),
        "free" if t.free else t.state,
        share(t.clip_share) if math.isfinite(t.clip_share) else "",
        f"{t.kept:.2f}" if math.isfinite(t.kept) else "",
        number(t.seconds) if math.isfinite(t.seconds) else "",
    )


def _facts_of_search(result: SearchResult) -> Table:
    s = result.settings
    facts = (
        ("storage", result.storage),
        ("trainings", results.runs_line(result)),
        ("budget", f"{s.max_runs} trainings"),
        ("learning rate", "" if s.lr is None else number(s.lr)),
        ("direction", s.direction),
        ("seeds", f"{s.seed} explores; fresh: {', '.join(map(str, result.verdict.seeds))}"),
        ("a seed varies", s.varied),
        ("range of max_norm", f"{number(s.low)} to {number(s.high)}"),
        ("free runs", "copied from the unclipped run" if s.reuse else "none: not deterministic"),
        ("ended because", result.why_ended),
    )
    rows = tuple((name, _name(value)) for name, value in facts if value)
    return Table("What the search was fixed to", (), rows)


# --- to make it again --------------------------------------------------------------------------


def _again(command: str, record: NormRecord | None) -> Section:
    made = tuple((name, clean(v)) for name, v in versions(record).items())
    code = (clean(command),) if command else ()
    return Section("To make this again", code=code, table=Table("Made with", (), made))


def versions(record: NormRecord | None) -> dict[str, str]:
    """What made a report: the versions of what computes and draws, and torch's of the run."""
    found = {"normtune": __version__, "Python": platform.python_version()}
    for package in ("numpy", "scipy", "optuna", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    torch = record.metadata.get("torch") if record is not None else None
    return found | ({"torch of the run": str(torch)} if torch else {})


def _made_with(command: str, record: NormRecord | None) -> dict[str, Any]:
    return {"command": command or None, "versions": versions(record)}


# --- text from files ---------------------------------------------------------------------------


def _name(text: object) -> str:
    """Text that may come from a file: one line, no control characters, not without end."""
    plain = clean(text)
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 3]}..."


def _points(sentences: Sequence[str]) -> tuple[str, ...]:
    kept = [_name(sentence) for sentence in sentences if sentence]
    more = len(kept) - MOST_POINTS
    return tuple(kept if more <= 0 else [*kept[:MOST_POINTS], f"... and {more} more"])
