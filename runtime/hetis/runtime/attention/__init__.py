"""Attention over virtual sequences, one per (request, KV head), where their KV lives."""
