"""The step from a running plan to the next one: what a change costs, which replicas stay, in which order to go
there."""
