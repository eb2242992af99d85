"""The processes of a plan's replica: listed, shown, and started by what runs processes."""
