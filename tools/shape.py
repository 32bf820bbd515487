"""Checks the shape of the tree: no module over 500 lines, a docstring at every file's head.

`python -m tools.shape` prints what breaks a rule and exits 1; part of `tools/check`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Final

MAX_LINES: Final = 500
PACKAGES: Final = ("protocol", "wingman", "fuzz", "tools", "tests")


def complaints(root: Path) -> list[str]:
    """One line for each file under `root` that breaks a rule."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_text("utf-8")
            n_lines = len(text.splitlines())
            if n_lines > MAX_LINES:
                found.append(f"{path}: {n_lines} lines, {MAX_LINES} are the limit: split it by noun")
            if text.strip() and not ast.get_docstring(ast.parse(text)):
                found.append(f"{path}: says nothing about itself at its head")
    return found


def main() -> int:
    """Print the complaints; 1 when there are any."""
    found = complaints(Path(__file__).parent.parent)
    print("\n".join(found) or "shape: every module is short and says what it is")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
