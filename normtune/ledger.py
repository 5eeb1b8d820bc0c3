"""The Optuna study in which every training is entered: one trial, one training."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune import records
from normtune.errors import StudyError
from normtune.trials import Settings, Trial

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from normtune.plan import Planned

FORMAT = 1  # of the attributes; a study of another format is refused
# Wide enough for every max_norm and rate: the trials are entered here, never sampled from here.
MAX_NORMS = (1e-12, 1e12)
LR_FACTORS = (1e-9, 1e9)
MOST_VALUES = 200  # intermediate values kept of a run
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Result:
    """What a run is entered with when it has ended.

    Attributes:
        state: finished, stuck, diverged, crashed or interrupted.
        value: The value that counts; None unless finished or stuck.
        values: What it reported, as (step, value).
        facts: Its user attributes: norms, clip share, seconds, reason.
    """

    state: str
    value: float | None = None
    values: tuple[tuple[int, float], ...] = ()
    facts: Mapping[str, Any] | None = None


class Ledger:
    """The study in its storage.

    Args:
        url: An Optuna storage URL.
        name: The name of the study.
        direction: ``minimize`` or ``maximize``.

    Raises:
        StudyError: If the storage cannot be opened, or holds another study by this name.
    """

    def __init__(self, url: str, name: str, direction: str) -> None:
        self.url = url
        with quiet(), explained(url):
            self._study = _open(url, name, direction)
        self._worst = math.inf if direction == "minimize" else -math.inf
        known = self._study.user_attrs
        if not known and not self._study.trials:
            self.keep("normtune", FORMAT)
        elif known.get("normtune") != FORMAT:
            message = (
                f"{masked(url)} holds a study {name!r} that this normtune did not make; "
                "choose another storage"
            )
            raise StudyError(message)

    # --- facts of the study

    def keep(self, key: str, value: Any) -> None:
        """Store a fact of the study."""
        self._study.set_user_attr(key, records.strict(value))

    def fact(self, key: str, default: Any = None) -> Any:
        """A stored fact, or `default`."""
        return self._study.user_attrs.get(key, default)

    @property
    def settings(self) -> Settings | None:
        """The settings that the search was fixed to; None before its unclipped run."""
        plain = self.fact("settings")
        if plain is None:
            return None
        numbers = ("suggestion", "low", "high", "current", "lr")
        fixed = {k: float(plain[k]) for k in numbers if plain.get(k) is not None}
        return Settings(**plain | fixed)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self.keep("settings", asdict(settings))

    # --- its trials

    def trials(self) -> tuple[Trial, ...]:
        """All trainings as the planner sees them, without interrupted and withdrawn ones."""
        return tuple(_as_trial(trial) for _, trial in self._entries())

    def numbers(self) -> dict[int, Trial]:
        """The same by trial number."""
        return {number: _as_trial(trial) for number, trial in self._entries()}

    def folders(self) -> dict[int, str]:
        """The name of each trained run's folder, by trial number."""
        attributes = {number: trial.user_attrs for number, trial in self._entries()}
        return {n: a["folder"] for n, a in attributes.items() if "folder" in a}

    def _entries(self) -> Iterator[tuple[int, FrozenTrial]]:
        withdrawn = set(self.fact("withdrawn", []))
        for trial in self._study.get_trials(deepcopy=False):
            attributes = trial.user_attrs
            mine = "stage" in attributes and attributes.get("state") != INTERRUPTED
            if mine and trial.number not in withdrawn:
                yield trial.number, trial

    def begin(self, planned: Planned) -> tuple[int, str]:
        """Enter a run that starts now; its trial number and the name of its folder."""
        folder = uuid.uuid4().hex[:8]  # a name that no earlier study left files under
        number = self._add(planned, {"folder": folder})
        return number, folder

    def end(self, number: int, result: Result) -> None:
        """Enter how a run ended."""
        from optuna.trial import Trial as OptunaTrial
        from optuna.trial import TrialState

        frozen = self._study.get_trials(deepcopy=False)[number]
        trial = OptunaTrial(self._study, frozen._trial_id)
        for key, value in {**(result.facts or {}), "state": result.state}.items():
            trial.set_user_attr(key, records.strict(value))
        for step, value in _thinned(result.values):
            trial.report(value, step)
        with quiet():
            if result.state in ("crashed", INTERRUPTED):
                self._study.tell(number, state=TrialState.FAIL)
            else:
                value_ = self._worst if result.value is None else result.value
                self._study.tell(number, value_)

    def copy(self, planned: Planned, source: int) -> int:
        """Enter a free run: the numbers of the unclipped run that it would repeat bit for bit."""
        from optuna.trial import TrialState

        frozen = self._study.get_trials(deepcopy=False)[source]
        attributes = {k: v for k, v in frozen.user_attrs.items() if k not in _OWN}
        facts = attributes | {"clip_share": 0.0, "kept": 1.0, "seconds": 0.0, "copied_from": source}
        return self._add(planned, facts, state=TrialState.COMPLETE, value=frozen.value)

    def withdraw(self, numbers: Iterable[int]) -> None:
        """Take trials out of account: to the planner they were never run."""
        withdrawn = {*self.fact("withdrawn", []), *numbers}
        if withdrawn:
            self.keep("withdrawn", sorted(withdrawn))

    def running(self) -> dict[int, str]:
        """Runs that were begun and not ended: trial number -> folder."""
        from optuna.trial import TrialState

        open_ = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {t.number: str(t.user_attrs["folder"]) for t in open_ if "folder" in t.user_attrs}

    def _add(self, planned: Planned, facts: Mapping[str, Any], **how: Any) -> int:
        from optuna.trial import TrialState, create_trial

        attributes = {
            "stage": planned.stage,
            "why": planned.reason,
            "free": planned.free,
            "fraction": planned.fraction,
            **facts,
        }
        trial = create_trial(
            **{"state": TrialState.RUNNING, **how},
            params=_parameters(planned),
            distributions=_distributions(planned),
            user_attrs=records.strict(attributes),
        )
        self._study.add_trial(trial)
        return len(self._study.get_trials(deepcopy=False)) - 1


_OWN = ("stage", "why", "free", "fraction", "folder")  # attributes that a copy does not take over


def exists(url: str, name: str) -> bool:
    """Whether a storage holds the study; a missing SQLite file is not made by asking."""
    import optuna

    file = re.fullmatch(r"sqlite:///([^?]+).*", url)
    if file and not Path(file[1]).exists():
        return False
    with quiet(), explained(url):
        return name in optuna.get_all_study_names(_storage(url))


def masked(url: str) -> str:
    """A storage URL without its password."""
    bare = re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", url)
    return bare.partition("?")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing about single trials meanwhile."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a database driver says into one line, without the password."""
    import optuna
    import sqlalchemy

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        reason = str(cause).replace(url, masked(url)).strip().partition("\n")[0]
        message = f"cannot use the storage {masked(url)}: {reason}"
        raise StudyError(message) from None


def _open(url: str, name: str, direction: str) -> optuna.Study:
    import optuna

    return optuna.create_study(
        storage=_storage(url),
        study_name=name,
        direction=direction,  # type: ignore[arg-type]
        load_if_exists=True,
    )


def _storage(url: str) -> optuna.storages.BaseStorage:
    import optuna

    if url.startswith("sqlite"):
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    # A server drops idle connections, and a run may take hours.
    options = {"pool_pre_ping": True, "pool_recycle": 1800}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None) or "its driver"
        message = f"the storage {masked(url)} needs a Python package: pip install {driver}"
        raise StudyError(message) from None


def _parameters(planned: Planned) -> dict[str, Any]:
    """No clipping is a category of its own, since no range holds an infinite max_norm."""
    clips = math.isfinite(planned.max_norm)
    own = {"max_norm": planned.max_norm} if clips else {}
    clipping = "on" if clips else "off"
    return {"clipping": clipping, "lr_factor": planned.lr_factor, "seed": planned.seed} | own


def _distributions(planned: Planned) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    known = {
        "clipping": CategoricalDistribution(("off", "on")),
        "max_norm": FloatDistribution(*MAX_NORMS, log=True),
        "lr_factor": FloatDistribution(*LR_FACTORS, log=True),
        "seed": IntDistribution(0, 2**31),
    }
    return {name: known[name] for name in _parameters(planned)}


def _as_trial(frozen: FrozenTrial) -> Trial:
    a = frozen.user_attrs
    state = a.get("state", "running")
    return Trial(
        max_norm=frozen.params.get("max_norm", math.inf),
        lr_factor=frozen.params["lr_factor"],
        seed=frozen.params["seed"],
        state=state,
        stage=a["stage"],
        value=frozen.value if state in ("finished", "stuck") else None,
        free=a["free"],
        first_value=a.get("first_value"),
        fraction=a["fraction"],
        **{key: float(a.get(key, "nan")) for key in NUMBERS},
    )


NUMBERS = ("largest_norm", "smallest_norm", "clip_share", "kept", "seconds")


def _thinned(values: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    """At most `MOST_VALUES` values, one a step, the last ones among them."""
    by_step = dict(values)
    every = -(-len(by_step) // MOST_VALUES)
    kept = list(by_step.items())[::-1][:: max(every, 1)]
    return [(max(step, 0), value) for step, value in reversed(kept)]
