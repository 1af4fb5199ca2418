"""Shipped fakes and suites: what a new engine, merge or task is tested with, here and by its author."""
