"""Verification of a plan under simulated traffic: which rate keeps its limits, and which other plan keeps more."""
