"""Corrects a profile by the iteration times that a running vLLM reports, or that its clients see.

`observed` is the common form of all sources; `iterations` makes it from a log (`between`: the time between lines),
`scraping` from ``/metrics``, `latencies` from the report of a benchmark's client; `replica` prices it with a profile;
`correction` fits and judges.
"""
