"""multipart/form-data bodies -> the JSON object of their text fields, as llama-server reads them."""

from __future__ import annotations

import asyncio
from typing import Final

import orjson

from wingman.errors import InvalidRequest, PayloadTooLarge
from wingman.http.messages import Request

_FORM: Final = "multipart/form-data"
MAX_FORM_BYTES: Final = 1024 * 1024
"""The standard library's parser is slow, and forms are for a few lines from a shell."""


def is_form(request: Request) -> bool:
    """Whether the body is a form (RFC 7578)."""
    return (request.headers.get(b"content-type") or b"").lower().startswith(_FORM.encode())


async def read_form(request: Request) -> bytes:
    """The fields as a JSON object of strings; files are left out. Raises InvalidRequest or
    PayloadTooLarge."""
    if len(request.body) > MAX_FORM_BYTES:
        raise PayloadTooLarge(f"a form may have {MAX_FORM_BYTES} bytes; send JSON instead")
    head = b"content-type: " + (request.headers.get(b"content-type") or b"") + b"\r\n\r\n"
    return await asyncio.to_thread(_fields, head + request.body)


def _fields(data: bytes) -> bytes:
    from email import policy  # slow to load, for a few lines from a shell
    from email.parser import BytesParser

    try:
        form = BytesParser(policy=policy.HTTP).parsebytes(data)
        parts = list(form.iter_parts()) if form.is_multipart() else []
        named = [(part.get_param("name", header="content-disposition"), part) for part in parts]
        fields = {
            name: part.get_payload(decode=True)
            for name, part in named
            if isinstance(name, str) and part.get_filename() is None
        }
        texts = {
            name: text.decode("utf-8", "replace") for name, text in fields.items() if isinstance(text, bytes)
        }
        body = orjson.dumps(texts)
    except Exception:  # noqa: BLE001 - the email package fails in many ways on what strangers send
        raise InvalidRequest("the body is not a valid form") from None
    if not parts:
        raise InvalidRequest("the body is not a valid form")
    return body
