"""The Optuna study in which every training is entered: one trial, one training."""

from __future__ import annotations

import math
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from normtune import records
from normtune.errors import StudyError
from normtune.format import count
from normtune.plan import Planned
from normtune.storages import explained, masked, opened, quiet
from normtune.trials import Settings, Trial

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, TrialState

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


@dataclass(frozen=True)
class Queued:
    """A run that was entered for workers.

    Attributes:
        number: Its trial number.
        folder: The name of its folder.
        state: waiting, running, ended, or interrupted: it is planned again.
        worker: The worker that has it; empty where none has said so yet.
    """

    number: int
    folder: str
    state: Literal["waiting", "running", "ended", "interrupted"]
    worker: str


class Ledger:
    """The study in its storage.

    Args:
        url: An Optuna storage URL.
        name: The name of the study.
        direction: ``minimize`` or ``maximize``; None opens a study that is there already.

    Attributes:
        url: The URL.
        storage: The storage as Optuna knows it; a `Patient` on a server.
        study: The study as Optuna knows it.

    Raises:
        StudyError: If the storage cannot be opened, or holds another study by this name.
    """

    def __init__(self, url: str, name: str, direction: str | None = None) -> None:
        self.url = url
        self.storage: Any = opened(url)
        with quiet(), explained(url):
            self.study = self._study = _open(self.storage, name, direction)
        self._worst = math.inf if self._study.direction.name == "MINIMIZE" else -math.inf
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

    def now(self) -> float:
        """The clock of the server that holds the study, in seconds since 1970."""
        return float(self.storage.now())

    def facts(self) -> dict[str, Any]:
        """All stored facts, read at once."""
        return dict(self._study.user_attrs)

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
        seen: set[str] = set()
        for trial in self._study.get_trials(deepcopy=False):
            attributes = trial.user_attrs
            mine = "stage" in attributes and _state(trial) != INTERRUPTED
            if not mine or trial.number in withdrawn:
                continue
            folder = str(attributes.get("folder", trial.number))
            if folder not in seen:  # a server that went away may have entered a run twice
                seen.add(folder)
                yield trial.number, trial

    def begin(self, planned: Planned) -> tuple[int, str]:
        """Enter a run that starts now; its trial number and the name of its folder."""
        folder = uuid.uuid4().hex[:8]  # a name that no earlier study left files under
        number = self._add(planned, {"folder": folder})
        return number, folder

    def end(self, number: int, result: Result) -> None:
        """Enter how a run ended."""
        from optuna.trial import Trial as OptunaTrial

        frozen = self._study.get_trials(deepcopy=False)[number]
        self.write(OptunaTrial(self._study, frozen._trial_id), result)
        state, value = self.told(result)
        with quiet():
            self._study.tell(number, value, state=state)

    def write(self, trial: optuna.Trial, result: Result) -> None:
        """Enter what there is to know of a run, but not yet that it has ended."""
        for step, value in _thinned(result.values):
            trial.report(value, step)
        for key, fact in {**(result.facts or {}), "state": result.state}.items():
            trial.set_user_attr(key, records.strict(fact))

    def told(self, result: Result) -> tuple[TrialState, float | None]:
        """What Optuna is told of a run that has ended: its state and its value."""
        from optuna.trial import TrialState

        if result.state in ("crashed", INTERRUPTED):
            return TrialState.FAIL, None
        if (result.facts or {}).get("pruned"):  # its last value becomes the trial's
            return TrialState.PRUNED, None
        return TrialState.COMPLETE, self._worst if result.value is None else result.value

    def curves(self, seed: int) -> list[dict[int, float]]:
        """What the whole trainings of a seed reported that ended well: step -> value."""
        kept = [
            trial.intermediate_values
            for _, trial in self._entries()
            if trial.params["seed"] == seed
            and _state(trial) == "finished"
            and not (trial.user_attrs["free"] or trial.user_attrs.get("pruned"))
        ]
        return [curve for curve in kept if curve]

    def notes(self) -> tuple[str, ...]:
        """What happened on the way: what was noted, and how many trainings crashed of what."""
        entries = (trial.user_attrs for _, trial in self._entries())
        reasons = Counter(str(a.get("reason")) for a in entries if a.get("state") == "crashed")
        noted = tuple(self.fact("notes", []))
        if not reasons:
            return noted
        told = "; ".join(f"{n} of: {reason}" for reason, n in reasons.most_common())
        return (*noted, f"{count(reasons.total(), 'training')} crashed: {told}")

    def copy(self, planned: Planned, source: int) -> int:
        """Enter a free run: the numbers of the unclipped run that it would repeat bit for bit."""
        from optuna.trial import TrialState

        frozen = self._study.get_trials(deepcopy=False)[source]
        attributes = {k: v for k, v in frozen.user_attrs.items() if not _is_own(k)}
        facts = attributes | {"clip_share": 0.0, "kept": 1.0, "seconds": 0.0, "copied_from": source}
        return self._add(planned, facts, state=TrialState.COMPLETE, value=frozen.value)

    def withdraw(self, numbers: Iterable[int]) -> None:
        """Take trials out of account: to the planner they were never run."""
        withdrawn = {*self.fact("withdrawn", []), *numbers}
        if withdrawn:
            self.keep("withdrawn", sorted(withdrawn))

    def running(self) -> dict[int, str]:
        """Runs that a controller began by itself and did not end: trial number -> folder."""
        from optuna.trial import TrialState

        open_ = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        own = [t for t in open_ if "queued" not in t.user_attrs]
        return {t.number: str(t.user_attrs["folder"]) for t in own if "folder" in t.user_attrs}

    # --- runs for workers

    def enqueue(self, planned: Planned, *, steps: int | None = None) -> tuple[int, str]:
        """Enter a run that waits for a worker; its trial number and the name of its folder.

        Args:
            planned: The run.
            steps: Where it is a warm-up, and no training of the study: how many steps.
        """
        from optuna.trial import TrialState

        folder = uuid.uuid4().hex[:8]
        facts = {"queued": True, "folder": folder} | ({} if steps is None else {"warm-up": steps})
        return self._add(planned, facts, state=TrialState.WAITING), folder

    def waiting(self) -> bool:
        """Whether a run waits for a worker."""
        from optuna.trial import TrialState

        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def planned(self, number: int) -> Planned:
        """What a trial was entered for."""
        return planned_of(self._study.get_trials(deepcopy=False)[number])

    def close(self) -> None:
        """Give the connections to a server back."""
        if hasattr(self.storage, "close"):
            self.storage.close()

    def queued(self) -> list[Queued]:
        """All runs that were ever entered for workers."""
        trials = self._study.get_trials(deepcopy=False)
        return [_as_queued(trial) for trial in trials if "queued" in trial.user_attrs]

    def take_back(self, numbers: Iterable[int] | None = None) -> None:
        """End runs for workers that no worker has; without `numbers` all that still wait."""
        from optuna.trial import TrialState

        waiting = [q.number for q in self.queued() if q.state == "waiting"]
        for number in waiting if numbers is None else numbers:
            frozen = self._study.get_trials(deepcopy=False)[number]
            mine = number not in waiting or self.storage.set_trial_state_values(
                frozen._trial_id, TrialState.RUNNING
            )
            if mine:
                with quiet():
                    self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def end_stale(self) -> None:
        """End the runs of workers that were silent for too long; they are planned again."""
        import optuna

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)

    def attributes(self, number: int) -> dict[str, Any]:
        """The attributes of a trial."""
        return dict(self._study.get_trials(deepcopy=False)[number].user_attrs)

    def _add(self, planned: Planned, facts: Mapping[str, Any], **how: Any) -> int:
        from optuna.trial import TrialState, create_trial

        attributes = {
            "stage": planned.stage,
            "why": planned.reason,
            "free": planned.free,
            "fraction": planned.fraction,
            **facts,
        }
        if "warm-up" in facts:
            del attributes["stage"]  # it is no training of the study
        trial = create_trial(
            **{"state": TrialState.RUNNING, **how},
            params=_parameters(planned),
            distributions=_distributions(planned),
            user_attrs=records.strict(attributes),
        )
        self._study.add_trial(trial)
        return len(self._study.get_trials(deepcopy=False)) - 1


# What a copy does not take over: what its source was planned for, and where it was trained.
_OWN = ("stage", "why", "free", "fraction", "folder", "queued", "worker", "lies in", "first steps")
NORMS = "norms "  # and two digits: the norms of a worker's run, in parts


def _is_own(key: str) -> bool:
    return key in _OWN or key.startswith(NORMS)


def _open(storage: Any, name: str, direction: str | None) -> optuna.Study:
    import optuna

    if direction is None:
        sampler = optuna.samplers.RandomSampler()  # asked by nobody
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    return optuna.create_study(
        storage=storage,
        study_name=name,
        direction=direction,  # type: ignore[arg-type]
        load_if_exists=True,
    )


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


def planned_of(frozen: FrozenTrial | optuna.Trial) -> Planned:
    """What a trial was entered for."""
    a, params = frozen.user_attrs, frozen.params
    return Planned(
        max_norm=params.get("max_norm", math.inf),
        lr_factor=params["lr_factor"],
        seed=params["seed"],
        stage=a.get("stage", "explore"),
        free=a["free"],
        reason=a["why"],
        fraction=a["fraction"],
    )


def _state(frozen: FrozenTrial) -> str:
    """How a run stands: Optuna's state comes first, since a worker may die between two writes."""
    name, entered = frozen.state.name, frozen.user_attrs.get("state")
    if name in ("RUNNING", "WAITING"):
        return "running"
    if name == "FAIL":
        return "crashed" if entered == "crashed" else INTERRUPTED
    return str(entered)


def _as_queued(frozen: FrozenTrial) -> Queued:
    open_ = {"WAITING": "waiting", "RUNNING": "running"}.get(frozen.state.name)
    state = open_ or ("interrupted" if _state(frozen) == INTERRUPTED else "ended")
    a = frozen.user_attrs
    return Queued(frozen.number, str(a["folder"]), state, str(a.get("worker", "")))  # type: ignore[arg-type]


def _as_trial(frozen: FrozenTrial) -> Trial:
    a = frozen.user_attrs
    state: Any = _state(frozen)
    return Trial(
        max_norm=frozen.params.get("max_norm", math.inf),
        lr_factor=frozen.params["lr_factor"],
        seed=frozen.params["seed"],
        state=state,
        stage=a["stage"],
        value=a.get("value", frozen.value) if state in ("finished", "stuck") else None,
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
