"""Request target -> decoded path and query (RFC 9112 3.2, RFC 3986, WHATWG form decoding)."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from protocol.errors import RemoteProtocolError


@dataclass(frozen=True, slots=True)
class Target:
    """A decoded request target: `path` is percent-decoded, `query` keeps order and repeats."""

    path: str
    query: tuple[tuple[str, str], ...]

    def first(self, name: str) -> str | None:
        """First query value called `name`, or None; a name without `=` has the value ''."""
        for key, value in self.query:
            if key == name:
                return value
        return None


def _decode(raw: bytes, what: str) -> str:
    try:
        text = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"the request {what} is not valid UTF-8") from None
    if "\x00" in text:
        raise RemoteProtocolError(f"the request {what} holds a NUL byte")
    return text


def parse_target(raw: bytes) -> Target:
    """Decode origin-form, absolute-form and asterisk-form targets.

    Raises RemoteProtocolError (400) when path or query is not UTF-8 after decoding.
    """
    rest = raw.partition(b"#")[0]
    path, _, query = rest.partition(b"?")
    scheme, separator, remainder = path.partition(b"://")
    if separator and scheme.isalnum():  # absolute-form, sent to proxies (RFC 9112, 3.2.2)
        slash = remainder.find(b"/")
        path = remainder[slash:] if slash >= 0 else b"/"
    pairs = []
    for item in query.split(b"&"):
        if item:
            name, _, value = item.replace(b"+", b" ").partition(b"=")
            pairs.append((_decode(name, "query"), _decode(value, "query")))
    return Target(path=_decode(path, "path"), query=tuple(pairs))
