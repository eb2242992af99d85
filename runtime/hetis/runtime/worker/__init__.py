"""Attention workers as processes: they hold KV of some heads and compute attention over it, without weights."""
