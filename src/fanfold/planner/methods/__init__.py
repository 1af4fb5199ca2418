"""What each way of being parallel costs: one file a method, the names of `parallel/`."""
