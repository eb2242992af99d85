"""The worth of another fleet: fleets with nodes added or removed, and what two proofs imply about a difference."""
