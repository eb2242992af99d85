"""What operators see of the planner: metrics, logs, traces, and the contents of the status page."""
