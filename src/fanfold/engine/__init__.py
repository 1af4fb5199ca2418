"""Engines carry a plan out and never choose: inline (the reference) and local processes."""
