"""A real engine as the planner steers it through the agent: assignments, moves and reports in the contract's words."""
