"""Dispatch and re-dispatch of one stage: its state and costs, and answers with times by cause."""
