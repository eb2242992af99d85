"""Tenants with different models on one fleet: a division of the GPUs by a rule, with a proof of how good it is."""
