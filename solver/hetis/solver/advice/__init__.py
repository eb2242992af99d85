"""What another fleet would be worth: fleets with nodes added or taken away, and what two proofs say of a difference."""
