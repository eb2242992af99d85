"""Dispatch for engines without a dispatcher of their own: the head maps that the planner itself is the authority of."""
