"""The search for the fastest implementation that is right, and the file that remembers it."""
