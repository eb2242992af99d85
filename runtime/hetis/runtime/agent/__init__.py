"""The daemon of a GPU node: it reports the node's state to the planner and makes its engine follow the planner."""
