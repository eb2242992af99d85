"""Replays request traces against a plan in virtual time, with the dispatcher that would run in production."""
