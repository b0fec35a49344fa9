"""Everything a video needs to go on bit for bit: in memory, as a file, and kept as a series of files."""
