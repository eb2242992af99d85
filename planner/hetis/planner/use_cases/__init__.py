"""The use cases, from files to a result: place, compare, what-if, replan, share, simulate, robustness."""
