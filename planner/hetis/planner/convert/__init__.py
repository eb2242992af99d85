"""Values of the solver and of files to messages of the contract, and back. Pure: no clock, no store, no stream."""
