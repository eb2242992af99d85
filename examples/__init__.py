"""Example files, and a demo of the planning service."""
