"""Writes the reference pages: ``make reference``."""

from __future__ import annotations

import sys

from tools.reference import main

if __name__ == "__main__":
    sys.exit(main())
