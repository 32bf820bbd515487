"""Exceptions -> status and body: the only such table.

Bodies are llama-server's: {"error": {"code", "message", "type"}}. Texts of unforeseen exceptions
go to the log, never to a client.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import orjson

from wingman import errors
from wingman.http.messages import Response

log = logging.getLogger("wingman.api")

_TABLE: Final[dict[type[errors.WingmanError], tuple[int, str]]] = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.ContextOverflow: (400, "exceed_context_size_error"),
    errors.MissingParameter: (422, "invalid_request_error"),
    errors.Conflict: (409, "conflict_error"),
    errors.UpstreamFailure: (502, "upstream_error"),
    errors.InsufficientRoom: (507, "insufficient_storage_error"),
    errors.PayloadTooLarge: (413, "invalid_request_error"),
    errors.Unauthenticated: (401, "authentication_error"),
    errors.Forbidden: (403, "permission_error"),
    errors.NotFound: (404, "not_found_error"),
    errors.NotSupported: (501, "not_supported_error"),
    errors.Overloaded: (429, "rate_limit_error"),
    errors.Unavailable: (503, "unavailable_error"),
    errors.EngineFailure: (500, "server_error"),
    errors.SlowReader: (500, "server_error"),
}
_TYPES: Final = {401: "authentication_error", 404: "not_found_error", 503: "unavailable_error"}


def error_body(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and JSON object for an exception; unforeseen ones are logged and become a plain 500."""
    status, kind = _TABLE.get(type(error), (500, "server_error"))  # type: ignore[arg-type]
    if not isinstance(error, errors.WingmanError):
        log.error("a request failed unexpectedly", exc_info=error)
        return 500, {"error": {"code": 500, "message": "internal server error", "type": kind}}
    message = error.message
    if isinstance(
        error, errors.ModelLoadFailure
    ):  # it names files: the item's `error` has it, for who may see
        message = "the model could not be loaded; see its error in /api/inference or the log"
    body: dict[str, Any] = {"code": status, "message": message, "type": kind}
    if isinstance(error, errors.InvalidRequest | errors.MissingParameter) and error.field is not None:
        body["param"] = error.field
    if isinstance(error, errors.ContextOverflow):
        body |= {"n_prompt_tokens": error.n_prompt_tokens, "n_ctx": error.n_ctx}
    return status, {"error": body}


def error_response(error: BaseException) -> Response:
    """The complete answer to a failed request."""
    status, body = error_body(error)
    headers: list[tuple[str, str]] = []
    if isinstance(error, errors.Overloaded | errors.Unavailable):
        headers.append(("retry-after", str(error.retry_after_s)))
    if status == 501:  # the OpenAI SDKs retry every 5xx unless told not to
        headers.append(("x-should-retry", "false"))
    if isinstance(error, errors.Unavailable):
        body["status"] = error.message.lower()
    return Response(status, orjson.dumps(body), headers=tuple(headers))


def protocol_error_response(status: int, message: str) -> Response:
    """The answer to something that is no valid HTTP request."""
    kind = _TYPES.get(status, "invalid_request_error")
    body = {"error": {"code": status, "message": message, "type": kind}}
    return Response(status, orjson.dumps(body), headers=(("connection", "close"),))
