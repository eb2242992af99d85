"""Dispatch for engines without a dispatcher of their own: the planner itself is the authority for their head maps."""
