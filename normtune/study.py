"""`StudyConfig`: the YAML file of a study, read safely and checked to the last key."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from normtune import rules
from normtune.errors import StudyError
from normtune.storages import chosen
from normtune.tasks import REPORTED

# studies/README.md, "How long a warm-up": what counts is the share of the schedule, so a search
# reads its whole unclipped run. Where only a warm-up is run, p90 of 200 steps lost about as much as
# that of half of the schedule; p90 of fewer steps lost more and misjudged more of the trainings.
WARMUP_STEPS = 200
MAX_BYTES = 100_000
MAX_DEPTH = 20
METRIC_EXAMPLE = "val loss ([0-9.]+)"
HEADING = "# normtune search {name} goes on with this study; normtune report {name} shows it.\n"
FILE_EXAMPLE = "{run_dir}/trainer_state.json:eval_loss"
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
Direction = Literal["minimize", "maximize"]
ValueRule = Literal["last", "best", "mean of last 3"]


def _margin(value: object) -> object:
    """A margin in loss units (0.01), or in percent of the loss ("1 %")."""
    number: object = value
    if isinstance(value, str) and value.rstrip().endswith("%"):
        number = _as_float(value.rstrip().removesuffix("%"))
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not 0 < float(number) < math.inf:  # type: ignore[arg-type]
        message = f"must be a number above 0, or a percentage such as 1 %, but got {value!r}"
        raise ValueError(message)
    return value.strip() if isinstance(value, str) else float(number)  # type: ignore[arg-type]


def duration(value: object) -> object:
    """Seconds from a number of them or from words; what is neither stays as it is.

    >>> duration("90 s"), duration("2 h"), duration(30)
    (90.0, 7200.0, 30.0)

    Raises:
        ValueError: If text is no time.
    """
    if not isinstance(value, str):
        return float(value) if type(value) is int else value
    found = re.fullmatch(r"\s*([0-9.]+)\s*(s|min|h|)\s*", value)
    amount = _as_float(found[1]) if found else None
    if found is None or amount is None:
        message = f"must be a time such as 90 s, 30 min or 2 h but got {value!r}"
        raise ValueError(message)
    return amount * SECONDS.get(found[2], 1.0)


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SearchConfig(_Strict):
    """What `normtune search` may spend and how it judges.

    Attributes:
        max_runs: How many trainings may run in all.
        lr_runs: How many of them may look for a lower learning rate; the plan decides without it.
        margin: What counts as equal: loss units, or percent such as ``"1 %"``.
        value: Which of the reported values of a run counts.
        jobs: How many trainings run at a time on this machine; 0 leaves them all to workers.
        storage: An Optuna storage URL; without it that of the environment variable
            NORMTUNE_STORAGE, else a SQLite file beside the study file.
        heartbeat: How often a worker says that it lives, in seconds; after three times that without
            a word its run is given to another.
        time_limit: How long a training may take: seconds, or words such as ``"30 min"``.
        explore_fraction: How much of the schedule the runs before the confirmation train.
        prune: Whether runs before the confirmation end early where they are hopeless, after half
            of their schedule at the earliest.
        finish_diverged: Whether runs go on to their end whose norms are no longer finite, or
            explode.
        min_seeds: The fewest fresh seeds of every arm that is compared; looks come from there on.
        seed: The seed of the first runs; fresh seeds count up from it.
    """

    max_runs: int = Field(24, ge=4, le=10_000)
    lr_runs: int | None = Field(None, ge=0)
    margin: Annotated[float | str, BeforeValidator(_margin)] | None = None
    value: ValueRule = "last"
    jobs: int = Field(1, ge=0)
    storage: str | None = Field(None, min_length=1)
    heartbeat: int = Field(60, ge=1)
    time_limit: Annotated[float, BeforeValidator(duration), Field(gt=0)] | None = None
    explore_fraction: float = Field(1.0, gt=0, le=1)
    prune: bool = False
    finish_diverged: bool = False
    min_seeds: int | None = Field(None, ge=3, le=30)
    seed: int = Field(0, ge=0, lt=2**31)


class StudyConfig(_Strict):
    """The keys of a study file.

    Attributes:
        train: ``file.py:function`` relative to the study file, or ``package.module:function``.
        command: The training as a command instead, run in the folder of the study file; ``{seed}``
            stands for the seed of a run, ``{run_dir}`` for a folder of its own.
        metric: A pattern for the validation value in a command's output, its number in a group; or
            ``report_metric`` for a script that calls `normtune.report_metric`.
        metric_file: Instead, a file that the command writes the value to, and its key there:
            ``{run_dir}/trainer_state.json:eval_loss``.
        seed_inside: Whether torch, numpy and random are seeded inside the command.
        params: Handed to the training as ``run.params``.
        direction: Whether a lower or a higher value is better.
        warmup_steps: How many unclipped steps the suggestion is read from; without it a search
            takes its whole unclipped run, and `normtune record` stops after 200.
        rule: The rule of the suggestion, such as ``p90``.
        device: ``cpu``, ``cuda``, ``cuda:1`` and so on; a GPU where there is one without it.
        threads: torch's threads in a run; cores divided by jobs without it.
        search: What the search may spend.
    """

    train: str | None = None
    command: tuple[str, ...] | None = Field(None, min_length=1, strict=False)
    metric: str | None = Field(None, min_length=1)
    metric_file: str | None = Field(None, min_length=1)
    seed_inside: bool = False
    params: dict[str, Any] = Field(default_factory=dict)
    direction: Direction = "minimize"
    warmup_steps: int | None = Field(None, ge=30)
    rule: str = "p90"
    device: str | None = Field(None, min_length=1)
    threads: int | None = Field(None, ge=1)
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _one_way_to_train(self) -> StudyConfig:
        if (self.train is None) == (self.command is None):
            came = "neither" if self.train is None else "both"
            message = f"needs either train: file.py:function or command: [...], but got {came}"
            raise ValueError(message)
        if self.train is not None:
            self._check_train(self.train)
        else:
            self._check_metric()
            self._check_command(self.command or ())
        return self

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        rules.parse(rule)
        return rule

    def _check_train(self, train: str) -> None:
        if self.metric is not None or self.metric_file is not None:
            message = "metric: belongs to command:; a train function reports with run.report(value)"
            raise ValueError(message)
        if self.seed_inside:
            message = "seed_inside: belongs to command:; a train function draws from run.seed"
            raise ValueError(message)
        source, _, function = train.rpartition(":")
        if not source or not function.isidentifier():
            message = f"train must be file.py:function or package.module:function but got {train!r}"
            raise ValueError(message)

    def _check_metric(self) -> None:
        if (self.metric is None) == (self.metric_file is None):
            came = "" if self.metric is None else ", but got both"
            message = (
                f"a command needs metric: such as '{METRIC_EXAMPLE}', or metric_file: such as "
                f"'{FILE_EXAMPLE}'{came}"
            )
            raise ValueError(message)
        if self.metric is not None and self.metric != REPORTED:
            _check_pattern(self.metric)
        if self.metric_file is not None and not all(self.metric_file.partition(":")):
            message = f"metric_file must be path:key, as in '{FILE_EXAMPLE}', but got "
            raise ValueError(message + repr(self.metric_file))

    def _check_command(self, command: Sequence[str]) -> None:
        if not (self.seed_inside or any("{seed}" in part for part in command)):
            message = (
                "each run needs a seed of its own: write {seed} where the command takes it, as in "
                "--seed {seed}, or set seed_inside: true (--seed-inside)"
            )
            raise ValueError(message)
        given = {"params": self.params, "device": self.device}
        wrong = [key for key, value in given.items() if value]
        if self.search.explore_fraction != 1.0:
            wrong.append("search.explore_fraction")
        if self.search.prune:
            wrong.append("search.prune")
        if wrong:
            message = f"{wrong[0]}: is for a train function; write it into the command itself"
            raise ValueError(message)


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        message = f"metric is no regular expression: {error} in {pattern!r}"
        raise ValueError(message) from None
    if not groups:
        message = (
            f"metric needs parentheses around the number, as in '{METRIC_EXAMPLE}', but got "
            f"{pattern!r}"
        )
        raise ValueError(message)


@dataclass(frozen=True)
class Study:
    """A study file that was read and checked.

    Attributes:
        path: The file.
        config: Its keys.
    """

    path: Path
    config: StudyConfig

    @property
    def name(self) -> str:
        """The name of the study: that of its file without the suffix."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """Where the study file lies; relative paths in it start here."""
        return self.path.parent

    @property
    def runs_folder(self) -> Path:
        """Where every run has a folder of its own."""
        return self.folder / f"{self.name}.runs"

    @property
    def train_file(self) -> Path | None:
        """The Python file that holds the training; None where it is a module or a program."""
        if self.config.command is not None:
            scripts = (self.folder / part for part in self.config.command if part.endswith(".py"))
            return next((script for script in scripts if script.is_file()), None)
        source = (self.config.train or "").rpartition(":")[0]
        return self.folder / source if source.endswith(".py") or "/" in source else None

    @property
    def storage(self) -> str:
        """The Optuna storage URL; a relative SQLite path is one relative to the study file."""
        given = chosen(self.config.search.storage)
        if given is None:
            return f"sqlite:///{self.folder / self.name}.db"
        match = re.fullmatch(r"sqlite:///(?!/)(.+)", given)
        return f"sqlite:///{self.folder / match[1]}" if match else given

    def threads(self, jobs: int) -> int:
        """How many threads torch has in one run when `jobs` of them run at a time.

        A command for which the user has set OMP_NUM_THREADS keeps it.
        """
        own = os.environ.get("OMP_NUM_THREADS", "") if self.config.command is not None else ""
        if own.isdecimal() and int(own) and not self.config.threads:
            return int(own)
        return self.config.threads or max(1, cores() // max(jobs, 1))

    def fingerprint(self) -> dict[str, Any]:
        """What must not change while a study goes on, flat: key -> value.

        The budget, the jobs and the storage may change; the training and how it is judged may not.
        """
        config = self.config.model_dump(mode="json")
        search = config.pop("search")
        params = config.pop("params")
        may_change = ("max_runs", "jobs", "storage", "heartbeat", "time_limit")
        flat = config | {f"params.{key}": value for key, value in params.items()}
        flat |= {f"search.{key}": v for key, v in search.items() if key not in may_change}
        if self.train_file is not None:
            content = self.train_file.read_bytes()
            flat["contents of the train file"] = hashlib.sha256(content).hexdigest()[:16]
        # A key that a later normtune knows changes no study that does not use it.
        return {key: value for key, value in flat.items() if value not in (None, False)}


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_study(path: str | os.PathLike[str]) -> Study:
    """Read and check a study file.

    Args:
        path: The YAML file.

    Raises:
        StudyError: With the file, the line and the key of the first fault.
    """
    file = Path(path).absolute()
    document = _Document.read(file, shown=Path(path))
    try:
        config = StudyConfig.model_validate(document.data)
    except ValidationError as error:
        raise StudyError(document.explain(error)) from None
    study = Study(file, config)
    if study.train_file is not None and not study.train_file.is_file():
        message = f"{document.place(('train',))}no such file: {study.train_file}"
        raise StudyError(message)
    return study


def study_of(path: str | os.PathLike[str], keys: Mapping[str, Any]) -> Study:
    """The study that a file with these keys would hold; nothing is written.

    Args:
        path: The study file that it would be.
        keys: The keys of a study file.

    Raises:
        ValueError: With the first fault.
    """
    try:
        config = StudyConfig.model_validate(keys)
    except ValidationError as error:
        fault = error.errors()[0]
        loc = [part for part in fault["loc"] if not _is_internal(part)]
        place = f"{'.'.join(map(str, loc))}: " if loc else ""
        message = place + _explain_fault(fault, loc)
        raise ValueError(message) from None
    return Study(Path(path).absolute(), config)


def save_study(study: Study, keys: Mapping[str, Any]) -> bool:
    """Write the file of a study made by `study_of`, unless it is there already.

    Args:
        study: The study.
        keys: What it was made of.

    Returns:
        Whether it was written; a file that says the same is left as it is.

    Raises:
        StudyError: If the file holds another study, or cannot be written.
    """
    if study.path.exists():
        _refuse_other(study)
        return False
    text = HEADING.format(name=study.path.name) + yaml.dump(
        dict(keys), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True
    )
    try:
        with study.path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        message = f"cannot write the study {study.path}: {error.strerror or error}"
        raise StudyError(message) from None
    return True


def _refuse_other(study: Study) -> None:
    there, asked = load_study(study.path).fingerprint(), study.fingerprint()
    other = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
    if other:
        changes = "; ".join(
            f"{k} is {there.get(k, 'absent')!r} there, {asked.get(k, 'absent')!r} here"
            for k in other
        )
        message = (
            f"{study.path} holds another study ({changes}); it is not overwritten. Go on with it "
            f"by normtune search {study.path.name}, or give this one a file: --study other.yaml"
        )
        raise StudyError(message)


# --- YAML -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-3 is a number, no is a word, 12:30 is text); a key counts once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be text"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                message = f"the key {key.value!r} appears twice"
                raise yaml.MarkedYAMLError(problem=message, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as the text that it is."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass(frozen=True)
class _Document:
    """The data of a YAML file, and the node tree that knows their lines."""

    shown: Path
    data: Any
    root: yaml.Node

    @classmethod
    def read(cls, file: Path, *, shown: Path) -> _Document:
        text = _text(file, shown)
        try:
            _refuse_traps(text)
            root = yaml.compose(text, Loader=_Loader)
            data = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
        except (yaml.YAMLError, ValueError) as error:
            raise StudyError(_explain_yaml(error, shown)) from None
        if root is None or data is None:
            message = f"{shown} is empty: a study needs at least train: file.py:function"
            raise StudyError(message)
        if not isinstance(data, dict):
            message = f"{shown}: a study file holds keys such as train: file.py:function"
            raise StudyError(message)
        return cls(shown, data, root)

    def explain(self, error: ValidationError) -> str:
        """The first fault as one line, and how many others there are."""
        faults = error.errors()
        first = faults[0]
        loc = tuple(part for part in first["loc"] if not _is_internal(part))
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return f"{self.place(loc)}{_explain_fault(first, loc)}{more}"

    def place(self, loc: Sequence[object]) -> str:
        """``file:line: key: `` of a value."""
        node, line = self.root, 0
        for part in loc:
            found = _child(node, part)
            if found is None:
                break
            line, node = found
        where = f"{self.shown}:{line + 1}: " if loc and line is not None else f"{self.shown}: "
        key = ".".join(map(str, loc))
        return f"{where}{key}: " if key else where


def _text(file: Path, shown: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        message = f"cannot read the study {shown}: {error.strerror or error}"
        raise StudyError(message) from None
    if len(raw) > MAX_BYTES:
        message = f"{shown} is larger than {MAX_BYTES} bytes: this is not a study file"
        raise StudyError(message)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{shown} is not text in UTF-8 (byte {error.start}): this is not a study file"
        raise StudyError(message) from None


def _refuse_traps(text: str) -> None:
    """An alias can make 166 bytes grow without bound, and deep nesting takes for ever to read."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        mark: Any = event.start_mark  # the stubs allow one of two classes only
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not read; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if depth > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _explain_yaml(error: Exception, shown: Path) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{shown}:{mark.line + 1}: " if mark is not None else f"{shown}: "
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "'\\t'" in problem:
        problem = "a tab; YAML is indented with spaces"
    elif "could not determine a constructor" in problem:
        problem = f"{problem}; only plain values are read"
    return f"{where}{problem}"


def _child(node: yaml.Node, part: object) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark.line, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line, node.value[part]
    return None


def _is_internal(part: object) -> bool:
    """Pydantic names the branch of a union or a validator in the place of an error."""
    return isinstance(part, str) and ("[" in part or part in ("float", "str", "int", "none"))


def _explain_fault(fault: Any, loc: Sequence[object]) -> str:
    kind, came = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        return _unknown_key(loc)
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    text = str(fault["msg"]).replace("Input should be", "must be")
    text = text.replace("a valid integer", "an integer").replace("a valid ", "a ")
    text = text.replace("Keys should be strings", "a key must be text")
    return f"{text} but got {_short(came)}"


def _unknown_key(loc: Sequence[object]) -> str:
    model = SearchConfig if loc[:1] == ("search",) else StudyConfig
    near = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1, cutoff=0.5)
    known = ", ".join(model.model_fields)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known: {known}"


def _short(value: object) -> str:
    text = "a mapping" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
