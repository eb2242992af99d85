"""What a plan records of its making: `parts` are its values, and `forms` how plan files have them."""
