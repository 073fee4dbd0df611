"""`python -m lbc_cli`: the same as `lbc`."""

from __future__ import annotations

from lbc_cli.cli import main

if __name__ == "__main__":
    main()
