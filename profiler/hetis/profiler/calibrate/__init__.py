"""Corrects a profile by what a running vLLM says of its iterations.

`observed` is what every source comes down to; `iterations` makes it of a log, `scraping` and `intervals` make it of
``/metrics``; `replica` prices it with a profile; `correction` fits and judges.
"""
