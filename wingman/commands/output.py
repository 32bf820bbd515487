"""What commands print: answers to stdout, everything said about them to stderr.

With `--json` stdout holds JSON documents and nothing else. Names come from the Hub and from other
clients, so nothing is printed before control characters are escaped: a name can't move the cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, Self

import orjson

from wingman.services import pace

_BAR: Final = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's own but for the rate: the server tells it."""


def printable(text: object) -> str:
    """Text with everything that is no visible character escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def speakable(text: str) -> str:
    """A model's words for a terminal: line breaks and tabs stay, other control characters go."""
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))


def size_text(n_bytes: float) -> str:
    """Bytes for people; nothing for 0, which means unknown."""
    return pace.size_text(n_bytes) if n_bytes > 0 else ""


class Output:
    """Where a command prints to. Streams are looked up when used."""

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json

    def document(self, value: Any) -> None:
        """One JSON document, on a line of its own."""
        sys.stdout.write(orjson.dumps(value).decode() + "\n")
        sys.stdout.flush()

    def line(self, text: object) -> None:
        """One line of the answer; not with --json."""
        if not self.is_json:
            sys.stdout.write(printable(text) + "\n")
            sys.stdout.flush()

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Aligned columns; numbers stand to the right."""
        cells = [[printable(cell) for cell in row] for row in (titles, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        to_right = [
            bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(titles))
        ]
        for row in cells:
            aligned = (
                cell.rjust(width) if is_right else cell.ljust(width)
                for cell, width, is_right in zip(row, widths, to_right, strict=True)
            )
            self.line("  ".join(aligned).rstrip())

    def note(self, text: object) -> None:
        """One line about what happens, to stderr."""
        print(printable(text), file=sys.stderr, flush=True)

    def progress(self, title: str, unit: str = "B") -> Progress:
        """A progress bar on stderr; none when that is no terminal."""
        return Progress(printable(title), unit)


class Progress:
    """A bar that is told where things stand, not what was added."""

    def __init__(self, title: str, unit: str) -> None:
        self._title = title
        self._unit = unit
        self._bar: Any = None

    def show(self, done: float, total: float, words: str = "") -> None:
        """Show `done` of `total`, 0 for unknown, with `words` behind the bar."""
        bar = self._bar = self._bar or self._open(done, total)
        bar.total = total or None
        bar.n = done
        bar.set_postfix_str(printable(words))

    def _open(self, done: float, total: float) -> Any:
        """A bar that counts from where things are, so that its rate is true for what is resumed."""
        from tqdm import tqdm

        return tqdm(
            desc=self._title,
            initial=done,
            total=total or None,
            unit=self._unit,
            unit_scale=self._unit == "B",
            bar_format=_BAR,
            dynamic_ncols=True,
            disable=None,  # no terminal, no bar
            file=sys.stderr,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
