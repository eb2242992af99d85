"""Attention workers as processes: KV of some heads and attention over it, no weights."""
