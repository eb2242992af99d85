"""Typed clients of the planning service."""
