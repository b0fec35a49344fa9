"""Shared by all parts: devices, files, processes, threads, wording."""
