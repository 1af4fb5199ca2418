"""The planner chooses, says why, and never runs anything."""
