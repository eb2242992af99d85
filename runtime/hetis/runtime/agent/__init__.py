"""The daemon of a GPU node: tells the planner how the node is, and makes its engine do what the planner asks."""
