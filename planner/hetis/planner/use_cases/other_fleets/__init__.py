"""Other fleets: what nodes more or less would change, what to buy next, and the change of a running plan."""
