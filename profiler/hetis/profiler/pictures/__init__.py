"""Profiles compared with measurements: the pairs, their regions, and pictures of them (PNG, HTML)."""
