"""`python -m wingman` is the `wingman` command."""

from wingman.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
