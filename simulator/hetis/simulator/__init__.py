"""Replay of request traces on a plan in virtual time, with the dispatcher that would run in production."""
