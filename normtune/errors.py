"""The errors that normtune raises on purpose; each message is one line for the user."""


class NormtuneError(Exception):
    """A refusal or a failure that normtune explains in one line."""


class RecordError(NormtuneError):
    """A file of norms that cannot be read or written."""


class SuggestionError(NormtuneError, ValueError):
    """Norms from which no max_norm can be suggested; the message says why."""


class StudyError(NormtuneError):
    """A study file, or the training that it names, that cannot be used."""
