"""Choosing among implementations of one computation by trying them, once for a machine.

What attention and the convolutions share: the search, the stopwatch, the file that remembers, what it depends on.
"""
