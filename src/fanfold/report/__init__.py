"""Reports listen to events; they never ask and never decide."""
