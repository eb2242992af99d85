"""Starts a replica of a plan: vLLM with the plugin and its attention workers, on any of several process runners."""
