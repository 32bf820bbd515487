"""What can go wrong between bytes and events.

Raised by every module of this package; nothing else escapes it for any input.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Base of both kinds; never raised itself."""


class LocalProtocolError(ProtocolError):
    """Our own side asked for something the protocol forbids: a bug in the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something the protocol or a limit forbids.

    `status_hint` is the HTTP status that tells the peer so, if it can still be told; `close_code` is
    the same for a WebSocket (RFC 6455, 7.4.1).
    """

    def __init__(self, message: str, status_hint: int = 400, close_code: int = 1002) -> None:
        super().__init__(message)
        self.status_hint = status_hint
        self.close_code = close_code
