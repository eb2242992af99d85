"""`python -m hetis.runtime.worker`: runs an attention worker in this process."""

from __future__ import annotations

import sys

from hetis.runtime.worker.main import main

if __name__ == "__main__":
    sys.exit(main())
