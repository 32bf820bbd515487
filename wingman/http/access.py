"""Who may call: API keys and CORS. Pure decisions over headers; `wingman.app` applies them."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from protocol import Headers

_LOCAL_ORIGIN = re.compile(r"^https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$")


class Keys:
    """A set of API keys; no keys means that everybody may call."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys if key)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def allow(self, headers: Headers) -> bool:
        """Whether the request carries a key: `Authorization: Bearer KEY`, `Authorization: KEY` or
        `X-Api-Key: KEY`. A wrong Authorization is final. Compared in constant time."""
        if not self._keys:
            return True
        given = headers.get(b"authorization")
        if given is None:
            given = headers.get(b"x-api-key") or b""
        given = given.removeprefix(b"Bearer ")
        matches = [
            hmac.compare_digest(given, key) for key in self._keys
        ]  # all of them, whatever the first say
        return any(matches)


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
        if self.origins == "*":
            return True
        if self.origins == "localhost":
            return _LOCAL_ORIGIN.match(origin) is not None
        return origin in (item.strip() for item in self.origins.split(","))
