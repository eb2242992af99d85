"""``python -m hetis.profiler.cli``."""

from hetis.profiler.cli.main import main

main()
