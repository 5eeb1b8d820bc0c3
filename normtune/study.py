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

MAX_BYTES = 100_000
MAX_DEPTH = 20
METRIC_EXAMPLE = "val loss ([0-9.]+)"
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
        jobs: How many trainings run at a time.
        storage: An Optuna storage URL; a SQLite file beside the study file without it.
        explore_fraction: How much of the schedule the runs before the confirmation train.
        seed: The seed of the first runs; fresh seeds count up from it.
    """

    max_runs: int = Field(24, ge=4, le=10_000)
    lr_runs: int | None = Field(None, ge=0)
    margin: Annotated[float | str, BeforeValidator(_margin)] | None = None
    value: ValueRule = "last"
    jobs: int = Field(1, ge=1)
    storage: str | None = Field(None, min_length=1)
    explore_fraction: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**31)


class StudyConfig(_Strict):
    """The keys of a study file.

    Attributes:
        train: ``file.py:function`` relative to the study file, or ``package.module:function``.
        command: The training as a command instead; ``{seed}`` stands for the seed.
        metric: Where a command's validation value is found: a pattern, or a key of a file.
        params: Handed to the training as ``run.params``.
        direction: Whether a lower or a higher value is better.
        warmup_steps: How many unclipped steps the suggestion is read from.
        rule: The rule of the suggestion, such as ``p90``.
        device: ``cpu``, ``cuda``, ``cuda:1`` and so on; a GPU where there is one without it.
        threads: torch's threads in a run; cores divided by jobs without it.
        search: What the search may spend.
    """

    train: str | None = None
    command: tuple[str, ...] | None = Field(None, min_length=1, strict=False)
    metric: str | None = Field(None, min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)
    direction: Direction = "minimize"
    warmup_steps: int = Field(200, ge=30)
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
        if self.command is not None and self.metric is None:
            message = f"a command needs metric: such as '{METRIC_EXAMPLE}'"
            raise ValueError(message)
        if self.train is not None:
            self._check_train(self.train)
        return self

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        rules.parse(rule)
        return rule

    def _check_train(self, train: str) -> None:
        if self.metric is not None:
            message = "metric: belongs to command:; a train function reports with run.report(value)"
            raise ValueError(message)
        source, _, function = train.rpartition(":")
        if not source or not function.isidentifier():
            message = f"train must be file.py:function or package.module:function but got {train!r}"
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
        """The Python file that holds the training; None where it is a module."""
        source = (self.config.train or "").rpartition(":")[0]
        return self.folder / source if source.endswith(".py") or "/" in source else None

    @property
    def storage(self) -> str:
        """The Optuna storage URL; a relative SQLite path is one relative to the study file."""
        given = self.config.search.storage
        if given is None:
            return f"sqlite:///{self.folder / self.name}.db"
        match = re.fullmatch(r"sqlite:///(?!/)(.+)", given)
        return f"sqlite:///{self.folder / match[1]}" if match else given

    def threads(self, jobs: int) -> int:
        """How many threads torch has in one run when `jobs` of them run at a time."""
        return self.config.threads or max(1, cores() // jobs)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change while a study goes on, flat: key -> value.

        The budget, the jobs and the storage may change; the training and how it is judged may not.
        """
        config = self.config.model_dump(mode="json")
        search = config.pop("search")
        params = config.pop("params")
        may_change = ("max_runs", "jobs", "storage")
        flat = config | {f"params.{key}": value for key, value in params.items()}
        flat |= {f"search.{key}": v for key, v in search.items() if key not in may_change}
        if self.train_file is not None:
            content = self.train_file.read_bytes()
            flat["contents of the train file"] = hashlib.sha256(content).hexdigest()[:16]
        return flat


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
