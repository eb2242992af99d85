"""The re-dispatch loop: from reports to changes that move head groups of running requests."""
