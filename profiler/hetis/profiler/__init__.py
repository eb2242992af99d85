"""Sources of operator times: rooflines calibrated on published measurements."""
