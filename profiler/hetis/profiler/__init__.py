"""Where operator times come from: rooflines calibrated on published measurements."""
