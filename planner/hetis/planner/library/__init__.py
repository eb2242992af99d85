"""What ``import hetis`` gives: the planner for programs and notebooks."""
