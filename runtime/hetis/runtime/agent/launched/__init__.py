"""Engines that the agent starts, watches and stops itself, as the planner assigns replicas to its node."""
