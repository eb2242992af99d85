"""The cost of attention on the available devices: as planned, as measured at the start, and as measured since."""
