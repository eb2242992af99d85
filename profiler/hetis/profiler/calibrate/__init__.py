"""Corrects a profile by what a running vLLM says of its iterations.

`observed` is what every source comes down to; `iterations` makes it of a log, `scraping` of ``/metrics``; `replica`
prices it with a profile; `correction` fits and judges.
"""
