"""A demo of plans that follow traffic."""
