"""The gRPC planning service: a server that turns messages into values and errors into statuses."""
