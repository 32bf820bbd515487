"""The OpenAPI 3.1 document, made from the table of routes and the types of bodies and answers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
from msgspec import Struct

from wingman import __version__
from wingman.api.ranges import LIMITS, SAMPLING
from wingman.api.replies import Error

_REF: Final = "#/components/schemas/{name}"
_ERRORS: Final = {
    400: "The request can't be served as it is; the error names the field.",
    401: "No API key, or a wrong one.",
    403: "This Host or Origin may not call; the message names the flag.",
    404: "There is no such thing.",
    413: "The body is larger than --max-body-size.",
    429: "A queue is full; Retry-After says when to try again.",
    500: "The model runtime failed on this request.",
    501: "This model or configuration does not do it.",
    503: "The model loads or the server shuts down.",
}
_CONTROL_ANSWERS: Final = {
    202: "Accepted; it goes on by itself.",
    208: "It is so already.",
}
_CONTROL_ERRORS: Final = {
    409: "Not in the state that things are in.",
    422: "A parameter is missing; the error names it.",
    502: "The Hub did not answer, or not as it should.",
    507: "It does not fit on the disk or in memory.",
}
_CONTROL: Final = "/api/"
_QUERY_PARAMETERS: Final = {
    "modelRepo": "A repository of the Hub, owner/name, or local.",
    "filePath": "A GGUF file in it; of a split model the first part.",
    "revision": "A branch, tag or commit (default: main).",
    "alias": "The name a model runs under.",
    "address": "Where a listener of its own is to be (default: the shared one's).",
    "port": "Its port; 0 or nothing: none of its own.",
    "contextSize": "Tokens of context of one conversation; 0: from the model.",
    "gpuLayers": "Layers on the GPU; -1: all that fit.",
    "chatTemplate": "A chat template instead of the model's: a built-in name or jinja2 text.",
    "force": "true: load it whatever memory there is.",
    "model": "Which model, where several are loaded.",
    "fail_on_no_slot": "Anything: answer 503 when no slot is idle.",
    "include_slots": "Anything: add the slots.",
    "action": "save, restore or erase.",
}
_EVENT: Final = {
    "type": "object",
    "description": "One event; data is JSON, or [DONE] at the end of OpenAI streams.",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
_REQUIRED: Final[dict[str, tuple[str, ...]]] = {
    "CompletionRequest": ("prompt",),
    "ChatRequest": ("messages",),
    "InfillRequest": ("input_prefix", "input_suffix"),
    "RerankRequest": ("query",),
}
"""Fields of bodies that have to be there; their types allow null, which counts as absent."""
_REQUIRED_PARAMETERS: Final = frozenset({"action"})


class Description(Struct, frozen=True):
    """What a route takes and answers. `replies` are the forms of its JSON, none when it is text; `streams`
    stands for Server-Sent Events beside them; `needs_key` is false for what anybody may ask."""

    method: str
    path: str
    summary: str
    replies: tuple[Any, ...]
    body: Any = None
    streams: bool = False
    query: tuple[str, ...] = ()
    needs_key: bool = True


def openapi_document(routes: Iterable[Description]) -> dict[str, Any]:
    """The document that describes these routes."""
    listed = tuple(routes)
    paths: dict[str, dict[str, Any]] = {}
    kinds = [kind for route in listed for kind in (route.body, *route.replies) if kind is not None]
    schemas, components = msgspec.json.schema_components((*kinds, Error), ref_template=_REF)
    for name, component in components.items():
        _add_limits(name, component)
    found = iter(schemas)
    for route in listed:
        body = next(found) if route.body is not None else None
        replies = [next(found) for _ in route.replies]
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, body, replies)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Wingman",
            "version": __version__,
            "description": "Runs large language models on your own machine.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _add_limits(title: str, component: dict[str, Any]) -> None:
    """State the ranges of numbers outside of which a request is refused, and what bodies can't do without."""
    if title in _REQUIRED:
        component["required"] = list(_REQUIRED[title])
    for name, schema in component.get("properties", {}).items():
        bounds = (LIMITS | SAMPLING).get(name)
        if bounds is not None and not bounds.clamps:
            schema |= {"minimum": bounds.low, "maximum": bounds.high}


def _operation(route: Description, body: Any, replies: list[Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "responses": _responses(route, replies),
    }
    parameters = [_path_parameter(segment[1:-1]) for segment in route.path.split("/") if segment[:1] == "{"]
    parameters += [_query_parameter(name) for name in route.query]
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if not route.needs_key:
        operation["security"] = []
    return operation


def _operation_id(route: Description) -> str:
    words = route.path.replace("{", "").replace("}", "").replace("-", "_").strip("/").split("/")
    return "_".join((route.method.lower(), *words))


def _responses(route: Description, replies: list[Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if replies:
        schema = replies[0] if len(replies) == 1 else {"anyOf": replies}
        content = {"application/json": {"schema": schema}}
    if route.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    responses = {"200": {"description": "Success.", "content": content}}
    is_control = route.path.startswith(_CONTROL)
    for status, description in _CONTROL_ANSWERS.items() if is_control else ():
        responses[str(status)] = {"description": description, "content": content}
    error = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    errors = _ERRORS | (_CONTROL_ERRORS if is_control else {507: _CONTROL_ERRORS[507]})
    for status, description in errors.items():
        responses[str(status)] = {"description": description, "content": error}
    return responses


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameter(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "required": name in _REQUIRED_PARAMETERS,
        "description": _QUERY_PARAMETERS[name],
        "schema": {"type": "string"},
    }
