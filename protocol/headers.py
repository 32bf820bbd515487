"""Immutable HTTP header fields with case-insensitive lookup (RFC 9110, 5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

RawHeader = tuple[bytes, bytes]


class Headers(Sequence[RawHeader]):
    """Ordered (name, value) pairs; names are held in lower case, values stripped as received."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._raw = tuple((bytes(name).lower(), bytes(value)) for name, value in raw)

    def get(self, name: bytes) -> bytes | None:
        """Value of the first field called `name` (any case), or None."""
        wanted = name.lower()
        for key, value in self._raw:
            if key == wanted:
                return value
        return None

    def get_all(self, name: bytes) -> tuple[bytes, ...]:
        """Values of every field called `name`, in order of arrival."""
        wanted = name.lower()
        return tuple(value for key, value in self._raw if key == wanted)

    def get_text(self, name: bytes) -> str | None:
        """`get` decoded as Latin-1, which maps every byte (RFC 9110, 5.5)."""
        value = self.get(name)
        return None if value is None else value.decode("latin-1")

    def has_token(self, name: bytes, token: bytes) -> bool:
        """Whether a comma-separated field such as Connection or Expect lists `token`."""
        wanted = token.lower()
        return any(
            part.strip().lower() == wanted for value in self.get_all(name) for part in value.split(b",")
        )

    def __len__(self) -> int:
        return len(self._raw)

    def __iter__(self) -> Iterator[RawHeader]:
        return iter(self._raw)

    @overload
    def __getitem__(self, index: int) -> RawHeader: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RawHeader]: ...
    def __getitem__(self, index: int | slice) -> RawHeader | Sequence[RawHeader]:
        return self._raw[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Headers) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"Headers({list(self._raw)!r})"
