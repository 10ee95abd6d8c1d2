"""`python -m porter`."""

from __future__ import annotations

from porter.cli import main

if __name__ == "__main__":
    main()
