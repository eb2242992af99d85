"""Stages of a pipeline in processes of their own: dense layers, and the devices of their heads."""
