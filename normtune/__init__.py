"""normtune: find the max_norm for ``clip_grad_norm_`` from your own training's gradient norms.

    recorder = normtune.NormRecorder(optimizer, "run.norms.jsonl")
    ...                                  # your loop, unchanged
    print(recorder.suggest())

The names below are loaded when they are first used: ``import normtune`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "NormRecord": "records",
    "NormRecorder": "recorder",
    "record_norm": "recorder",
    "report_metric": "metrics",
    "Suggestion": "suggestion",
    "suggest": "suggestion",
    "SearchResult": "results",
    "load_result": "stored",
    "RULES": "rules",
    "NormtuneError": "errors",
    "RecordError": "errors",
    "SuggestionError": "errors",
    "StudyError": "errors",
}

__all__ = [
    "RULES",
    "NormRecord",
    "NormRecorder",
    "NormtuneError",
    "RecordError",
    "SearchResult",
    "StudyError",
    "Suggestion",
    "SuggestionError",
    "load_result",
    "record_norm",
    "report_metric",
    "suggest",
]

if TYPE_CHECKING:
    from normtune.errors import NormtuneError, RecordError, StudyError, SuggestionError
    from normtune.metrics import report_metric
    from normtune.recorder import NormRecorder, record_norm
    from normtune.records import NormRecord
    from normtune.results import SearchResult
    from normtune.rules import RULES
    from normtune.stored import load_result
    from normtune.suggestion import Suggestion, suggest


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        message = f"module 'normtune' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(f"normtune.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
