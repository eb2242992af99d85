"""`python -m hetis.runtime.stages`: a stage of a pipeline in a process of its own."""

from __future__ import annotations

import sys

from hetis.runtime.stages.main import main

if __name__ == "__main__":
    sys.exit(main())
