"""Example files, and demos of hetis' services."""
