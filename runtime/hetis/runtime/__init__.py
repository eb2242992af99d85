"""What runs on GPU nodes: the agent beside an engine."""
