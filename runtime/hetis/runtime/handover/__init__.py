"""Prompts computed by one engine and decoded by another: their KV on its way."""
