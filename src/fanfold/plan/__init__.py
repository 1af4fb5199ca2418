"""Frozen records that the planner, the engines and the job share."""
