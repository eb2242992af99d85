"""The planning service and twelve agents on one machine."""
