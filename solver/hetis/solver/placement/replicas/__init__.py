"""Replicas without named GPUs, their costs as tables, and the enumeration of those that an engine runs."""
