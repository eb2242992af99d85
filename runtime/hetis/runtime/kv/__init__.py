"""KV memory of one device: its pages and their assignment to (request, KV head)."""
