"""``python -m hetis.planner.cli``."""

from hetis.planner.cli import main

main()
