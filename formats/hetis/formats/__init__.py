"""The file formats of hetis: conversion of YAML and JSON documents to and from the solver's values, and the catalogues.

Start at `hetis.formats.documents` (load, dump, schema of every kind) and `hetis.formats.catalogue` (GPUs, models,
workloads by name). `hetis.formats.units` reads quantities such as ``80GiB``; `hetis.formats.errors` holds
`DocumentError`, the one error that a bad file or name raises.

Import the submodules: this package itself imports nothing, so that a command line starts quickly.
"""
