"""What attention costs on the devices at hand: as the plan has it, as measured at the start, as measured since."""
