"""Weights on disk: opened without copying, renamed to the original names, and checked name by name."""
