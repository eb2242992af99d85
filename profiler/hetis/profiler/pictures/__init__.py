"""Profiles held against what was measured: the pairs, their regions, and pictures of them (PNG, HTML)."""
