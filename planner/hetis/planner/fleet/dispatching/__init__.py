"""Dispatch for engines without a dispatcher of their own: head maps for which the planner itself is the authority."""
