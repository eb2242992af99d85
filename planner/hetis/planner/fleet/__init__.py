"""The nodes and replicas of running clusters: links to agents, activation, two-phase re-dispatch."""
