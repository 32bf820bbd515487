"""Domain errors: raised by cause at the lowest layer that knows it, with what the caller needs.

No HTTP status lives here; `wingman.api.errors` holds the only table that maps these to
answers. Messages are written for the person who sent the request and never carry exception
texts of libraries.
"""

from __future__ import annotations


class WingmanError(Exception):
    """Base of everything Wingman raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(WingmanError):
    """The request can't be served as it is; `field` names what to change, when one field is at fault."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PayloadTooLarge(WingmanError):
    """The request is larger than a documented limit."""


class ContextOverflow(WingmanError):
    """The prompt does not fit the context of a slot; both counts are in tokens."""

    def __init__(self, n_prompt_tokens: int, n_ctx: int) -> None:
        super().__init__(
            f"request ({n_prompt_tokens} tokens) exceeds the available context size ({n_ctx} tokens), "
            "try increasing it"
        )
        self.n_prompt_tokens = n_prompt_tokens
        self.n_ctx = n_ctx


class Unauthenticated(WingmanError):
    """No API key, or a wrong one."""


class MissingParameter(WingmanError):
    """A query lacks a parameter; `field` names it."""

    def __init__(self, field: str) -> None:
        super().__init__(f"missing parameter: {field}")
        self.field = field


class Conflict(WingmanError):
    """It can't be done in the state that things are in."""


class UpstreamFailure(WingmanError):
    """The Hub did not answer, or not as it should."""


class InsufficientRoom(WingmanError):
    """It does not fit on the disk or in memory."""


class Forbidden(WingmanError):
    """The caller is known but may not do this."""


class NotFound(WingmanError):
    """No such path, model or object."""


class NotSupported(WingmanError):
    """Understood, but this server, build or configuration does not do it."""


class Overloaded(WingmanError):
    """A bounded queue is full; trying again after `retry_after_s` seconds makes sense."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(WingmanError):
    """Loading, draining or wedged: the same request may succeed later."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailure(WingmanError):
    """The model runtime failed while it worked on this request."""


class SlowReader(WingmanError):
    """The client left more unread output than it may; its job was cancelled."""


class ModelLoadFailure(WingmanError):
    """A model file is missing, damaged, of an unknown kind, or does not fit in memory."""


class DraftMisfit(ModelLoadFailure):
    """The draft model can't guess what the model that is loaded will say; without it the model can be loaded."""


class ConfigurationError(WingmanError):
    """A flag, environment variable or configuration file can't be used as given."""
