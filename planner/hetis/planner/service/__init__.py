"""The gRPC planning service: a server that converts messages to values and errors to statuses."""
