"""The engine: requests in, tokens out; it alone owns the map from heads to devices."""
