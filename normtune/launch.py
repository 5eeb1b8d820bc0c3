"""A command as a child process, watched without editing it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import psutil

from normtune import orders, records
from normtune.errors import NormtuneError, RecordError, SuggestionError
from normtune.orders import Orders
from normtune.records import SUFFIX, NormRecord

if TYPE_CHECKING:
    from typing_extensions import Self

    from normtune.suggestion import Suggestion

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
GRACE_SECONDS = 15.0  # for a command that has recorded enough to end by itself
LAST_SECONDS = 5.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Recorded:
    """What came of a recorded command.

    Attributes:
        path: The record file.
        record: The norms in it.
        suggestion: The max_norm suggested from them; None where they carry none.
        refusal: Why they carry none.
        exit_code: The command's own; 0 where normtune ended it early.
    """

    path: Path
    record: NormRecord
    suggestion: Suggestion | None
    refusal: str
    exit_code: int


class NothingRecordedError(NormtuneError):
    """A command that gave no norms; the message says why.

    Attributes:
        exit_code: The command's own exit code.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Launched:
    """A command that runs, with normtune in each of its Python processes.

    Args:
        argv: The command; no shell is involved.
        given: What normtune does in it.
        cwd: Where it runs; here without it.
        environment: Its environment before normtune's part; this process's own without it.
        stdout: Where its output goes, as for `subprocess.Popen`; this process's own without it.
        stderr: The same for its errors.
        own_group: Whether it leads a process group, so that signals reach all that it starts. In
            a terminal's own group Ctrl-C reaches it by itself, and it can read from the terminal.

    Raises:
        NormtuneError: If it cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        given: Orders,
        *,
        cwd: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        own_group: bool = True,
    ) -> None:
        given.check()
        self.argv, self.orders = tuple(argv), given
        self._own_group = own_group
        try:
            self._process = subprocess.Popen(  # noqa: S603 - it is the user's own command
                self.argv,
                cwd=cwd,
                env=given.environment(environment),
                stdout=stdout,
                stderr=stderr,
                start_new_session=own_group,
            )
        except OSError as error:
            message = f"cannot start {self.argv[0]}: {error.strerror or error}"
            raise NormtuneError(message) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.exit_code is None:
            self.end()

    @property
    def pid(self) -> int:
        """The process id, which is the id of its group where it has its own."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code as a shell gives it, 128 + n for signal n; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    @property
    def enough(self) -> bool:
        """Whether all the steps that were asked for are recorded."""
        return bool(orders.marks(self.orders.folder, orders.ENOUGH))

    @property
    def diverged(self) -> str:
        """Why its training has diverged, where it was told to look; else empty."""
        return next(iter(orders.marks(self.orders.folder, orders.DIVERGED).values()), "")

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; its exit code, None where `timeout` seconds were not enough."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self.exit_code

    def signal(self, number: int) -> None:
        """Send a signal to it, and to all that it started where it leads a group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._own_group:
                os.killpg(self.pid, number)
            else:
                self._process.send_signal(number)

    def end(self, grace: float = LAST_SECONDS) -> None:
        """End it and all that it started: politely, then for certain."""
        started = self._family()
        self.signal(signal.SIGTERM)
        self.wait(grace)
        self.signal(signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()

    def _family(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self.pid)
            return [*process.children(recursive=True), process]
        except psutil.Error:
            return []


# --- what it left behind -----------------------------------------------------------------------


def records_in(folder: Path) -> list[Path]:
    """The records of a run's folder with at least one step, the one to suggest from first.

    That is the one with most steps, of several such that of the lowest rank.
    """
    sizes: dict[Path, int] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=_rank_and_name):
        with contextlib.suppress(RecordError):
            sizes[path] = len(NormRecord.load(path))
    return sorted(sizes, key=lambda path: -sizes[path])


def _rank_and_name(path: Path) -> tuple[int, str]:
    found = re.match(r"rank(\d+)-", path.name)
    return (int(found[1]) if found else 0, path.name)


def merge(paths: Sequence[Path], output: Path) -> None:
    """Append records to the file `output`, so that it is read as the first of them.

    Each stays an attempt of its own, which `--attempt` picks.
    """
    whole = b"".join(_whole_lines(path) for path in reversed(paths))
    writer = records.RecordWriter(output)
    writer.write([whole.decode(errors="replace").rstrip("\n")])
    if not writer.close():
        message = f"cannot write the record {output}: {writer.error}"
        raise RecordError(message)


def _whole_lines(path: Path) -> bytes:
    """What a file holds, without a line that a killed process left unfinished."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def findings_in(folder: Path) -> list[str]:
    """What was found in processes that recorded no step."""
    sentences: dict[str, None] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        for line in _whole_lines(path).splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if "finding" in found:
                    sentences[str(found["text"])] = None
    return list(sentences)


def why_nothing(launched: Launched) -> str:
    """Which of the known reasons there is for a command that recorded nothing."""
    folder, command = launched.orders.folder, Path(launched.argv[0]).name
    failed = list(orders.marks(folder, orders.FAILED).values())
    pythons, torches = orders.marks(folder, orders.PYTHON), orders.marks(folder, orders.TORCH)
    if failed:
        return f"normtune could not work in a process of {command}: {failed[0]}"
    if not pythons:
        return _no_python(launched.argv)
    if not torches:
        n = len(pythons)
        ran = "its Python process" if n == 1 else f"any of its {n} Python processes"
        return f"{command} ran, but torch was not imported by {ran}"
    found = findings_in(folder)
    if found:
        return found[0]
    return _no_step(orders.marks(folder, orders.OVER), torches, launched.exit_code or 0)


def _no_python(argv: Sequence[str]) -> str:
    """No process left its mark."""
    name = Path(argv[0]).name
    closed = [a for a in argv[1:] if re.fullmatch(r"-[A-Za-z]*[IES][A-Za-z]*", a)]
    if name.startswith("python") and closed:
        return (
            f"{name} was started with {closed[0]}, which keeps its environment out, and normtune "
            "with it; leave that option away, or make a NormRecorder in the script"
        )
    return (
        f"no Python process of {name} saw normtune: it is no Python program, or it starts Python "
        "with -I, -E or -S, with a cleared environment (sudo, env -i), in a container or on "
        "another machine (docker, ssh); make a NormRecorder in the script instead"
    )


def _no_step(over: Mapping[int, str], torches: Mapping[int, str], code: int) -> str:
    """Torch was there, but nothing stepped and no clip function was called."""
    built = 0
    for text in over.values():
        with contextlib.suppress(ValueError, KeyError):
            built += int(json.loads(text)["optimizers"])
    ended = f"the command ended with exit code {code}" if code else "the command ended"
    if built:
        made = "1 optimizer was" if built == 1 else f"{built} optimizers were"
        return f"{made} made, but no step was taken before {ended}"
    if code:
        return f"{ended} before it made an optimizer or called a clip function of torch"
    if not over.keys() & torches.keys():
        return "the processes that imported torch were killed before their first step"
    return (
        "torch was imported, but no optimizer of torch.optim was made and no clip function of "
        "torch was called: the update is written by hand, an optimizer class never calls "
        "super().__init__(), or an engine (DeepSpeed, Megatron) steps by itself. Make a "
        'NormRecorder(model, measure="backward") in the loop, or call normtune.record_norm(norm)'
    )


# --- normtune record -- COMMAND ----------------------------------------------------------------


def record_command(
    argv: Sequence[str],
    *,
    output: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    max_norm: float | None = None,
    stdout: IO[Any] | None = None,
) -> Recorded:
    """Run a training command, record its unclipped norms, and suggest a max_norm.

    Args:
        argv: The command, such as ``["torchrun", "--nproc-per-node", "2", "train.py"]``.
        output: The record file; without it ``<script>.norms.jsonl`` in the current folder. A
            file that exists gets a new attempt.
        steps: End the command after so many recorded steps.
        max_norm: Clip there in place of the command's own clipping; inf clips nothing.
        stdout: Where the command's output goes; this process's own without it.

    Raises:
        NothingRecordedError: If it recorded nothing, with the reason.
        NormtuneError: If it cannot be started, or `output` cannot be written.
        ValueError: If an argument cannot be meant.
    """
    if not argv:
        message = "give the command after --, as in: normtune record -- python train.py"
        raise ValueError(message)
    path = Path(output) if output is not None else Path(_default_name(argv))
    folder = _run_folder(path)
    try:
        given = Orders(folder, max_norm=max_norm, steps=steps)
        code, launched = _run(argv, given, stdout)
        found = records_in(folder)
        if not found:
            raise NothingRecordedError(why_nothing(launched), code)
        merge(found, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _recorded(path, code)


def _recorded(path: Path, code: int) -> Recorded:
    from normtune.suggestion import suggest

    record = NormRecord.load(path)
    try:
        return Recorded(path, record, suggest(record), "", code)
    except SuggestionError as error:
        return Recorded(path, record, None, str(error), code)


def _default_name(argv: Sequence[str]) -> str:
    """``<script>.norms.jsonl``, after the first Python file or module of the command.

    >>> _default_name(["torchrun", "--nproc-per-node=2", "src/train.py", "--lr", "1"])
    'train.norms.jsonl'
    >>> _default_name(["python", "-m", "package.train"])
    'package.train.norms.jsonl'
    """
    scripts = [Path(a).stem for a in argv if a.endswith(".py")]
    modules = [b for a, b in itertools.pairwise(argv) if a == "-m"]
    return [*scripts, *modules, Path(argv[0]).stem][0] + SUFFIX


def _run_folder(path: Path) -> Path:
    """Beside the record, so that what a crash of the whole machine leaves is found there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{path.name}.parts-", dir=path.parent.absolute()))
    except OSError as error:
        message = f"cannot write the record {path}: {error.strerror or error}"
        raise RecordError(message) from None


def _run(argv: Sequence[str], given: Orders, stdout: IO[Any] | None) -> tuple[int, Launched]:
    """The command from start to end; its exit code is 0 where it recorded enough."""
    sys.stdout.flush()
    terminal = sys.stdin is not None and sys.stdin.isatty()
    launched = Launched(argv, given, stdout=stdout, own_group=not terminal)
    with _forwarding(launched, terminal=terminal):
        while launched.wait(POLL_SECONDS if given.steps else None) is None:
            if launched.enough:
                launched.wait(GRACE_SECONDS)
                launched.end()
    code = launched.exit_code
    return (0 if launched.enough else code if code is not None else 1), launched


@contextlib.contextmanager
def _forwarding(launched: Launched, *, terminal: bool) -> Iterator[None]:
    """Hand signals on to the command, which decides what they mean, and wait for it.

    A terminal sends Ctrl-C to the command itself; a second one from here would count twice.
    """

    def forward(number: int, _: FrameType | None) -> None:
        by_terminal = number in (signal.SIGINT, signal.SIGQUIT)
        if not (terminal and by_terminal):
            launched.signal(number)

    before = {}
    for name in FORWARDED:
        number = getattr(signal, name, None)
        if number is not None:
            with contextlib.suppress(ValueError):  # only the main thread may
                before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
