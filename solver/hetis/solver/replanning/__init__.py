"""From a running plan to the next: the cost of a change, the replicas that stay, and the order of steps."""
