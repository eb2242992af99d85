"""From a plan, or from options, to the devices of an engine."""
