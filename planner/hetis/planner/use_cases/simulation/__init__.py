"""Simulated traffic: runs of a plan, or of a part of it, at other settings, and what they mean for a service level."""
