"""Conversion between values of the solver or of files and messages of the API. Pure: no clock, no store, no stream."""
