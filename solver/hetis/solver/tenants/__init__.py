"""Tenants with different models on one fleet: who gets which GPUs, by a rule, with a proof of how good that is."""
