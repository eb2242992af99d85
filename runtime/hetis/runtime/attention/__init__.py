"""Attention over virtual sequences, one per (request, KV head), computed where their KV lives."""
