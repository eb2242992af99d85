"""The use cases, each from files to a result: place, compare, what-if, replan, share, simulate."""
