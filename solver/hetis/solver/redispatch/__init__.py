"""Re-dispatch: which head groups of running requests move where, if load drifts, memory fills or a device leaves."""
