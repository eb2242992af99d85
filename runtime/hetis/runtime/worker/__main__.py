"""`python -m hetis.runtime.worker`: an attention worker of its own process."""

from __future__ import annotations

import sys

from hetis.runtime.worker.main import main

if __name__ == "__main__":
    sys.exit(main())
