"""Autotuning: the search for the fastest correct implementation, and the file that caches the result."""
