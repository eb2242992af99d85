"""The gRPC planning service: a server at its edge, where messages become values and errors become statuses."""
