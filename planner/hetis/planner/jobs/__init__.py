"""Searches for plans in separate processes: problems, outcomes, and the pool that runs them."""
