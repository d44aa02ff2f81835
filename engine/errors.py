"""Everything the engine raises on purpose. Anything else that escapes is a bug."""


class SkippyError(Exception):
    """Base of all errors that the engine raises on purpose."""


class InvalidRequest(SkippyError):
    """A request can never be served as it is; nothing of it was kept.

    `param` names the offending request field in OpenAI's vocabulary, or is None
    when no single field is at fault.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(SkippyError):
    """The engine cannot be built from this configuration."""


class CheckpointError(SkippyError):
    """A model folder is missing, truncated, damaged or of an unsupported kind."""


class AdapterError(SkippyError):
    """An adapter folder is missing, truncated, damaged or made for another shape of model."""


class TrainingError(SkippyError):
    """A training cannot go on; what it saved last is kept."""


class EngineDead(SkippyError):
    """The engine process is gone; no request can be served any more."""
