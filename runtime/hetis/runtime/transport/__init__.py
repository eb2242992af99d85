"""Frames and channels between the engine and its attention workers: fixed binary forms, no pickle, no gRPC."""
