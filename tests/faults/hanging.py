"""A planner whose event loop hangs on SIGUSR2, because signal handlers run in the loop's thread."""

from __future__ import annotations

import signal
import time

from hetis.planner.service.main import main

HANGS_S = 60.0

if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, lambda _number, _frame: time.sleep(HANGS_S))
    main()
