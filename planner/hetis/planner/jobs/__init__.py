"""Searches for plans in processes of their own: problems, outcomes, and the pool that runs them."""
