"""Searches for plans in worker processes."""
