"""Forms: their text fields as JSON, whatever strangers send."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import Headers, Target
from wingman.api.forms import MAX_FORM_BYTES, is_form, read_form
from wingman.errors import InvalidRequest, PayloadTooLarge
from wingman.http.messages import Request


def request(content_type: str, body: bytes) -> Request:
    headers = Headers([(b"content-type", content_type.encode())])
    return Request("POST", Target("/completion", ()), headers, "1", "peer", body)


async def test_text_fields_become_json_and_files_are_left_out() -> None:
    sent = httpx.Request("POST", "http://x", data={"prompt": "Grüße"}, files={"file": ("a.txt", b"x")})
    form = request(sent.headers["content-type"], sent.read())
    assert is_form(form)
    assert json.loads(await read_form(form)) == {"prompt": "Grüße"}


@given(body=st.binary(max_size=200))
async def test_anything_else_is_refused(body: bytes) -> None:
    for data in (body, b"--b\r\n" + body, b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n' + body):
        try:
            fields = json.loads(await read_form(request("multipart/form-data; boundary=b", data)))
        except InvalidRequest:
            continue
        assert all(isinstance(value, str) for value in fields.values())


async def test_a_huge_form_is_refused() -> None:
    with pytest.raises(PayloadTooLarge):
        await read_form(request("multipart/form-data; boundary=b", b"x" * (MAX_FORM_BYTES + 1)))
    assert not is_form(request("application/json", b""))
