"""The command line: each command parses, makes one call, and prints."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

from normtune import __version__
from normtune.errors import NormtuneError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from normtune.launch import Recorded as RecordedCommand
    from normtune.records import NormRecord
    from normtune.results import SearchResult
    from normtune.search import Progress
    from normtune.sources import FoundSeries
    from normtune.study import Study
    from normtune.suggestion import Suggestion

P = ParamSpec("P")

REFUSED, WRONG_USE, INTERRUPTED = 1, 2, 130
WIDEST = 120
LONG_BYTES = 64 << 20  # files above this get a progress bar

app = typer.Typer(
    name="normtune",
    help="Find the max_norm for clip_grad_norm_ from your own training, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the ``normtune`` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 still gets its line
    app(prog_name="normtune")


def _one_line(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what normtune refuses into one line and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except NormtuneError as error:
            _fail(error, REFUSED)
        except ValueError as error:
            _fail(error, WRONG_USE)
        except KeyboardInterrupt:
            _fail("interrupted; what is done is kept", INTERRUPTED)

    return wrapped


def _fail(error: object, code: int) -> NoReturn:
    from normtune.format import clean

    print(f"normtune: {clean(error)}", file=sys.stderr)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:  # noqa: FBT001  typer's callback
    if wanted:
        print(f"normtune {__version__}")
        raise typer.Exit


@app.callback()
def normtune(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find the max_norm for clip_grad_norm_ from your own training, and prove it."""


# --- suggest -----------------------------------------------------------------------------------


@app.command()
@_one_line
def suggest(
    source: Annotated[
        str,
        typer.Argument(
            help="A record, a log (trainer_state.json, metrics.csv, train.log, TensorBoard, ...), "
            "a folder of them, or - for standard input."
        ),
    ],
    *,
    rule: Annotated[str, typer.Option(help="p1 to p99, median_multiple:2, or pascanu:5.")] = "p90",
    skip: Annotated[
        str, typer.Option(help='Leave out a burn-in: a number of steps, or "10 %".')
    ] = "0",
    current: Annotated[
        float | None, typer.Option(help="The max_norm that you use today; it becomes a row.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The key, column or tag that holds the norm.")
    ] = None,
    series: Annotated[
        str | None, typer.Option(help="Which set of parameters of a normtune record.")
    ] = None,
    attempt: Annotated[
        int | None, typer.Option(help="Which run of a file that holds several; -1 is the last.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="The optimizer, where the log does not say: SGD, AdamW ...")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the norm-like series in SOURCE and stop.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the norms to this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Suggest a max_norm from the gradient norms of a run; only reads."""
    if list_:
        _print_list(source, as_json=as_json)
        return
    from normtune.suggestion import suggest as suggest_from

    record = _read(source, key=key, series=series, attempt=attempt)
    suggestion = suggest_from(
        record, rule=rule, skip=_skip(skip), current=current, optimizer=optimizer
    )
    if plot is not None:
        _draw(suggestion, plot)
    _print_suggestion(suggestion, record, as_json=as_json)


def _read(source: str, **options: Any) -> NormRecord:
    from normtune import sources

    if source == "-":
        return sources.read(sys.stdin.buffer, **options)
    with _reading_bar(Path(source)) as progress:
        return sources.read(source, progress=progress, **options)


def _skip(text: str) -> int | str:
    return int(text) if text.strip().isdecimal() else text


def _print_suggestion(suggestion: Suggestion, record: NormRecord, *, as_json: bool) -> None:
    from normtune import sources
    from normtune.format import clean, format_suggestion

    if as_json:
        print(_json(suggestion.to_dict()))
        return
    if record.origin.kind != "normtune record":
        print(f"took {clean(sources.describe(record))}")
    _print_plot(suggestion)
    print(format_suggestion(suggestion, width=_width()))


def _print_list(source: str, *, as_json: bool) -> None:
    from normtune import sources

    found = sources.list_series(sys.stdin.buffer if source == "-" else source)
    if as_json:
        from dataclasses import asdict

        print(_json([asdict(series) for series in found]))
        return
    if not found:
        print(f"no gradient norms found in {source}")
    for series in found:
        print(_listed(series))


def _listed(series: FoundSeries) -> str:
    from normtune.format import clean, count, number

    steps = "no steps"
    if series.first_step is not None:
        steps = f"steps {series.first_step} to {series.last_step}"
    side = {"before": "pre-clip", "after": "post-clip", "unknown": "clip side not known"}
    parts = [
        f"{clean(series.key):<40} {count(series.points, 'point'):>15}",
        f"{number(series.lowest)} to {number(series.highest)}",
        steps,
        side[series.clip_side],
        clean(series.path),
    ]
    return "  ".join(parts if series.whole else [*parts, "(a part of the parameters)"])


def _print_plot(suggestion: Suggestion) -> None:
    """A small plot, on a terminal that has the room and the characters for it."""
    from normtune.terminal import plot_lines

    encoding = (getattr(sys.stdout, "encoding", None) or "").lower()
    if sys.stdout.isatty() and encoding.startswith("utf"):
        lines = plot_lines(suggestion.record, suggestion.max_norm, width=_width())
        print("\n".join([*lines, ""] if lines else []), end="\n" if lines else "")


def _draw(drawn: Suggestion | SearchResult, file: Path) -> None:
    from normtune import pictures

    def figure() -> Figure | None:
        axes: Axes | tuple[Axes, Axes] = drawn.plot()
        return (axes[0] if isinstance(axes, tuple) else axes).get_figure(root=True)

    pictures.save(figure, file)


# --- record ------------------------------------------------------------------------------------


@app.command()
@_one_line
def record(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY | -- COMMAND...",
            help="A study file (YAML), whose warm-up is run; or after -- a training command, which "
            "is run as it is: python train.py, torchrun ..., accelerate launch ...",
            show_default=False,
        ),
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(help="The record file; without it <study or script>.norms.jsonl."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="End the command after so many recorded steps.")
    ] = None,
    max_norm: Annotated[
        float | None,
        typer.Option(help="Clip the command at this in place of its own; inf clips nothing."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Record the unclipped norms of a training that stays as it is, and suggest a max_norm.

    The exit code is the command's own, or 1 where it was 0 and no max_norm can be suggested.
    """
    if len(command) == 1 and Path(command[0]).suffix in (".yaml", ".yml"):
        if steps is not None or max_norm is not None:
            message = "--steps and --max-norm are for commands; a study says warmup_steps itself"
            raise ValueError(message)
        _record_study(Path(command[0]), output, as_json=as_json)
        return
    from normtune.launch import NothingRecordedError, record_command

    shown = sys.stderr if as_json else None  # the output is JSON alone
    try:
        done = record_command(command, output=output, steps=steps, max_norm=max_norm, stdout=shown)
    except NothingRecordedError as error:
        _fail(f"nothing was recorded: {error}", error.exit_code or REFUSED)
    _finish_command(done, as_json=as_json)


def _record_study(study: Path, output: Path | None, *, as_json: bool) -> None:
    from normtune.search import record_study

    done = record_study(study, output=output)
    if not as_json:
        print(f"recorded {len(done.record)} unclipped norms to {done.path}")
    _print_suggestion(done.suggestion, done.record, as_json=as_json)


def _finish_command(done: RecordedCommand, *, as_json: bool) -> None:
    if not as_json:
        print(f"recorded {len(done.record)} unclipped norms to {done.path}")
    if done.exit_code:
        print(f"normtune: the command ended with exit code {done.exit_code}", file=sys.stderr)
    if done.suggestion is None:
        _fail(done.refusal, done.exit_code or REFUSED)
    _print_suggestion(done.suggestion, done.record, as_json=as_json)
    if done.exit_code:
        raise typer.Exit(done.exit_code)


# --- search ------------------------------------------------------------------------------------


@app.command()
@_one_line
def search(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY | -- COMMAND...",
            help="A study file (YAML); or after -- a training command, in which {seed} stands for "
            "the seed of a run and {run_dir} for a folder of its own.",
            show_default=False,
        ),
    ],
    *,
    metric: Annotated[
        str | None,
        typer.Option(
            help="The validation value in the command's output, such as 'val loss ([0-9.]+)'; or "
            "report_metric, for a script that calls normtune.report_metric(value)."
        ),
    ] = None,
    metric_file: Annotated[
        str | None,
        typer.Option(
            help="A JSON, CSV or TensorBoard file that it writes the value to, and the key: "
            "'{run_dir}/trainer_state.json:eval_loss'."
        ),
    ] = None,
    maximize: Annotated[bool, typer.Option("--maximize", help="A higher value is better.")] = False,
    seed_inside: Annotated[
        bool,
        typer.Option(
            "--seed-inside", help="Seed torch, numpy and random in a command without {seed}."
        ),
    ] = False,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps of the command that the suggestion is read from.")
    ] = None,
    study: Annotated[
        Path,
        typer.Option(help="Where the study of a command is written, to go on with and to share."),
    ] = Path("study.yaml"),
    time_limit: Annotated[
        str | None, typer.Option(help='How long a training may take: seconds, or "30 min".')
    ] = None,
    max_runs: Annotated[
        int | None, typer.Option(help="How many trainings may run in all, instead of the file's.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="How many run at a time on this machine, instead of the file's; 0 leaves them all "
            "to normtune worker."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="An Optuna storage URL; without it the study file's, then that of the environment "
            "variable NORMTUNE_STORAGE, then a SQLite file beside the study file."
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would run, how long it takes, and stop.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the trainings print.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask before the first run.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the runs to this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the suggestion on validation loss: runs the study's trainings, ends with a verdict.

    A second start resumes. Ctrl-C keeps what is done.
    """
    from normtune.search import plan_of
    from normtune.search import search as run_search

    keys = {
        "metric": metric,
        "metric_file": metric_file,
        "seed_inside": seed_inside,
        "direction": "maximize" if maximize else None,
        "warmup_steps": warmup_steps,
        "search": {"max_runs": max_runs, "jobs": jobs, "time_limit": time_limit},
    }
    asked, save = _asked_study(command, study, keys)
    if plan:
        print(plan_of(asked, max_runs=max_runs, storage=storage))
        return
    if plot is not None:
        from normtune import pictures

        pictures.check(plot)  # before hours of training, not after
    if not yes and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        print(plan_of(asked, max_runs=max_runs, storage=storage))
        typer.confirm("Start?", default=True, abort=True)
    if save() and not as_json:
        print(f"wrote {study}: normtune search {study} goes on with it")
    with _search_progress(quiet=as_json) as progress:
        result = run_search(
            asked.path,
            max_runs=max_runs,
            jobs=jobs,
            storage=storage,
            time_limit=time_limit,
            progress=progress,
            verbose=verbose,
        )
    print(_json(result.to_dict()) if as_json else result)
    if plot is not None:
        _draw(result, plot)


def _asked_study(
    command: list[str], file: Path, keys: dict[str, Any]
) -> tuple[Study, Callable[[], bool]]:
    """The study of a search, and how its file is written where it is a command's."""
    from normtune.study import load_study, save_study, study_of

    if len(command) == 1 and Path(command[0]).suffix in (".yaml", ".yml"):
        given = [key for key in keys if keys[key] and key != "search"]
        if given:
            message = f"--{given[0].replace('_', '-')} is for a command; a study says it itself"
            raise ValueError(message)
        return load_study(command[0]), lambda: False
    if file.absolute().parent != Path.cwd():
        message = f"--study must be a file in this folder, where the command runs, but got {file}"
        raise ValueError(message)
    kept = {key: value for key, value in keys.items() if value and key != "search"}
    spent = {key: value for key, value in keys["search"].items() if value is not None}
    plain = {"command": command, **kept, **({"search": spent} if spent else {})}
    study = study_of(file, plain)
    return study, lambda: save_study(study, plain)


# --- worker ------------------------------------------------------------------------------------


@app.command()
@_one_line
def worker(
    study: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDY]",
            help="The study file on this machine; without it the path that the search had.",
            show_default=False,
        ),
    ] = None,
    *,
    storage: Annotated[
        str | None,
        typer.Option(
            help="The storage URL of the study, on a server; better by the environment variable "
            "NORMTUNE_STORAGE, since every user of a machine can see its command lines."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--study", help="The name of the study, where no study file is given."),
    ] = None,
    wait: Annotated[
        str | None,
        typer.Option(
            help='End after so long with nothing to train: seconds, or "30 min"; without it when '
            "the study is done."
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the trainings print.")
    ] = False,
) -> None:
    """Train the runs of a study that a normtune search on another machine plans, one at a time.

    It ends by itself when the study is done. Ctrl-C and SIGTERM give the run back.
    """
    from normtune.worker import work

    work(study, storage=storage, name=name, wait=wait, tell=_print_line, verbose=verbose)


def _print_line(text: str) -> None:
    from normtune.format import clean

    print(clean(text), flush=True)


# --- report ------------------------------------------------------------------------------------


@app.command()
@_one_line
def report(
    source: Annotated[
        str, typer.Argument(help="A study file (YAML), or a record or log as for suggest.")
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file; report.html without, other formats are printed."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="html, markdown, text or json; the file's ending without."),
    ] = None,
    rule: Annotated[str, typer.Option(help="As for suggest.")] = "p90",
    skip: Annotated[str, typer.Option(help="As for suggest.")] = "0",
    current: Annotated[float | None, typer.Option(help="As for suggest.")] = None,
    key: Annotated[str | None, typer.Option(help="As for suggest.")] = None,
    series: Annotated[str | None, typer.Option(help="As for suggest.")] = None,
    attempt: Annotated[int | None, typer.Option(help="As for suggest.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="As for suggest.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="As for search."),
    ] = None,
) -> None:
    """Make one page to share, from a study or from norms; nothing is trained."""
    from normtune import reports
    from normtune.pages import FORMS

    wanted = reports.form_of(form, output)
    file = reports.PAGE if output is None and wanted == "html" else output
    if file is not None:
        reports.check(file, source=source)
    asked = reports.Asked(
        rule=rule,
        skip=skip,
        current=current,
        key=key,
        series=series,
        attempt=attempt,
        optimizer=optimizer,
        storage=storage,
    )
    made_by = {"format": form} if form else {}
    made_by |= {"output": str(output)} if output else {}
    content = reports.content_of(
        sys.stdin.buffer if source == "-" else source, asked, made_by=made_by
    )
    text = FORMS[wanted](content)
    if file is None:
        print(text, end="")
        return
    reports.write(text, file)
    print(f"wrote {file} ({len(text.encode()) / 1000:.0f} kB)")


# --- progress ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading_bar(path: Path) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for large files on a terminal; nothing else has one."""
    large = path.is_file() and path.stat().st_size > LONG_BYTES
    if not (large and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"reading {path.name}", total=None)
        yield lambda read, size: bar.update(task, completed=read, total=size)


@contextlib.contextmanager
def _search_progress(*, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, one line an event elsewhere."""
    if quiet:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield lambda event: print(_event_line(event), flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False, markup=False)
    texts = [
        TextColumn(f"{{task.{name}}}", markup=False) for name in ("fields[left]", "description")
    ]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *texts)
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None, left="")

        def show(event: Progress) -> None:
            bar.update(task, completed=event.done, total=event.total, left=_time_left(event))
            if event.kind == "started":
                bar.update(task, description=event.text)
            else:
                bar.console.print(_event_text(event))

        yield show


def _event_line(event: Progress) -> str:
    """An event where there is no bar."""
    if event.kind == "output":
        return _event_text(event)
    left = _time_left(event) if event.kind == "finished" else ""
    return f"[{event.done}/{event.total}{left and ', '}{left}] {event.text}"


def _event_text(event: Progress) -> str:
    from normtune.format import clean

    return clean(event.text) if event.kind == "output" else event.text


def _time_left(event: Progress) -> str:
    from normtune.format import duration

    known = math.isfinite(event.seconds_left) and event.done < event.total
    return f"{duration(event.seconds_left)} left at most" if known else ""


def _width() -> int:
    return min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False, default=str)
