"""Files of dispatch: the state of a replica's stage, and new requests."""
