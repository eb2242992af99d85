"""Dispatch: the choice of devices for the head groups of new requests, with a proof of how good it is."""
