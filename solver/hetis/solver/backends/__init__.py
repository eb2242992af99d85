"""What searches run on: HiGHS, compiled loops, and the clock that guards them."""
