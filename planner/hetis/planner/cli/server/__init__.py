"""Verbs that ask a planner."""
