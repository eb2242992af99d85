"""Placement: which GPUs form which replicas, with a proof of how good the choice is."""
