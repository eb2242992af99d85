"""``python -m hetis.planner.cli``."""

from hetis.planner.cli.entry import main

main()
