"""Corrects a profile by the iteration times that a running vLLM reports.

`observed` is the common form of all sources; `iterations` makes it from a log (`between`: the time between lines),
`scraping` from ``/metrics``; `replica` prices it with a profile; `correction` fits and judges.
"""
