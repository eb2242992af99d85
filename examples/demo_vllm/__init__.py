"""The demo of ``make demo-vllm``."""
