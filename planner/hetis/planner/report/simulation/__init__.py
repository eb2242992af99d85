"""Simulations of plans: their figures as text and JSON, and their charts."""
