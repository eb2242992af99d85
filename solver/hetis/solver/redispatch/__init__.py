"""Re-dispatch: which head groups of running requests move where, when load drifts, memory fills or a device leaves."""
