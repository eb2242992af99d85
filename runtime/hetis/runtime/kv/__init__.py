"""KV memory of one device: pages, and which (request, KV head) has which."""
