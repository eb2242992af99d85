"""Other fleets: what nodes more or less would change, and the change of a running plan."""
