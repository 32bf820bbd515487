"""Who may call: API keys, Host, Origin and CORS. Pure decisions over headers; `wingman.app` applies them.

Host is checked because a page of another site can point its own name at this machine (DNS rebinding), Origin
and Sec-Fetch-Site because a GET that changes something needs no permission of the browser's.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from protocol import Headers
from wingman.errors import Forbidden, Unauthenticated

_LOCAL_ORIGIN = re.compile(r"^https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$")


KEY_PROTOCOL: Final = "wingman.key."
"""A WebSocket subprotocol of this beginning carries a key in base64url: browsers can't set a header."""


class Keys:
    """A set of API keys; no keys means that everybody may call."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys if key)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def allow(self, headers: Headers) -> bool:
        """Whether the request carries a key: `Authorization: Bearer KEY`, `Authorization: KEY`,
        `X-Api-Key: KEY`, or a WebSocket subprotocol. A wrong Authorization is final. Compared in constant
        time."""
        if not self._keys:
            return True
        given = headers.get(b"authorization")
        if given is None:
            given = headers.get(b"x-api-key")
        if given is None:
            given = _protocol_key(headers)
        given = given.removeprefix(b"Bearer ")
        matches = [
            hmac.compare_digest(given, key) for key in self._keys
        ]  # all of them, whatever the first say
        return any(matches)


def _protocol_key(headers: Headers) -> bytes:
    """The key in Sec-WebSocket-Protocol, or b""."""
    for offered in (headers.get_text(b"sec-websocket-protocol") or "").split(","):
        name = offered.strip()
        if name.startswith(KEY_PROTOCOL):
            coded = name.removeprefix(KEY_PROTOCOL).encode("ascii", "replace")
            try:
                return base64.urlsafe_b64decode(coded + b"=" * (-len(coded) % 4))
            except binascii.Error:
                return b""
    return b""


class Hosts:
    """The names this server may be called by."""

    def __init__(self, bound: Sequence[str], allowed: Sequence[str] = ()) -> None:
        """`bound` are the addresses listened on, `allowed` further names; "*" among those allows all."""
        self._names = {host.strip("[]").lower() for host in (*bound, *allowed)}
        self._takes_any_address = not self._names.isdisjoint({"0.0.0.0", "::", ""})  # noqa: S104 - compared, not bound
        self._takes_all = "*" in allowed

    def allow(self, host: str) -> bool:
        """Whether a host name or address, without its port, is one of them. An address can't be rebound, so
        that any will do where all are listened on."""
        name = host.strip("[]").lower().rstrip(".")
        if self._takes_all or name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or self._takes_any_address)

    def is_own(self, host: str) -> bool:
        """Whether it is a name of this machine beyond doubt: loopback, or one that was named."""
        name = host.strip("[]").lower()
        address = _address(name)
        is_local = name == "localhost" or name.endswith(".localhost")  # RFC 6761, 6.3
        is_loopback = is_local or (address is not None and address.is_loopback)
        is_wild = address is not None and address.is_unspecified
        return is_loopback or (name in self._names and not is_wild)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _host_of(authority: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True, slots=True)
class Guard:
    """What a request has to pass before it is looked at."""

    keys: Keys
    hosts: Hosts | None = None
    """None: any Host will do."""
    origins: tuple[str, ...] | None = None
    """Origins that may call besides this machine's own; None: any may."""

    def check_origin(self, headers: Headers, *, is_unix: bool = False) -> None:
        """Raise Forbidden, naming the flag, for a foreign Host, or a page of another site. What comes by a
        Unix socket may name any Host: no page can come that way."""
        host = headers.get_text(b"host")
        if self.hosts is not None and host and not is_unix and not self.hosts.allow(_host_of(host)):
            raise Forbidden("this server does not go by the name of the Host header (--allow-host)")
        if self.origins is None:
            return
        origin = headers.get_text(b"origin")
        if origin is not None:
            if not self.allows_origin(origin, host):
                raise Forbidden("pages of this Origin may not call (--cors-origins)")
        elif (headers.get_text(b"sec-fetch-site") or "") == "cross-site":
            raise Forbidden("pages of other sites may not call (--cors-origins)")

    def check_key(self, headers: Headers) -> None:
        """Raise Unauthenticated without a valid key."""
        if not self.keys.allow(headers):
            raise Unauthenticated("Invalid API Key")

    def allows_origin(self, origin: str, host: str | None) -> bool:
        """Whether pages of an origin may call: those of this machine, and those allowed."""
        if self.origins is None or origin in self.origins:
            return True
        name = _host_of(origin.partition("://")[2])
        is_same = bool(host) and name == _host_of(host or "")
        return bool(name) and (is_same or (self.hosts is not None and self.hosts.is_own(name)))


@dataclass(frozen=True, slots=True)
class Cors:
    """Cross-origin policy (WHATWG Fetch, 3.2), with llama-server's values."""

    origins: str = "*"
    methods: str = "GET, POST, DELETE, OPTIONS"
    headers: str = "*"
    allows_credentials: bool = True

    def answer_headers(self, request: Headers) -> tuple[tuple[str, str], ...]:
        """Headers that every answer to a cross-origin request carries."""
        origin = request.get_text(b"origin")
        if origin is None or not self._allows(origin):
            return ()
        return (("access-control-allow-origin", origin), ("vary", "Origin"))

    def preflight_headers(self, request: Headers) -> tuple[tuple[str, str], ...]:
        """Headers of the answer to OPTIONS."""
        wanted = request.get_text(b"access-control-request-headers")
        # "*" does not cover Authorization for requests with credentials: name what was asked for
        is_wild = self.headers == "*" and wanted is not None and "authorization" in wanted.lower()
        allowed = wanted if is_wild and wanted is not None else self.headers
        fields = [("access-control-allow-methods", self.methods), ("access-control-allow-headers", allowed)]
        if self.allows_credentials:
            fields.append(("access-control-allow-credentials", "true"))
        return tuple(fields)

    def _allows(self, origin: str) -> bool:
        names = [item.strip() for item in self.origins.split(",")]
        is_local = "localhost" in names and _LOCAL_ORIGIN.match(origin) is not None
        return self.origins == "*" or is_local or origin in names
