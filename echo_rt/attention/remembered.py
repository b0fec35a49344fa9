"""The file in which the outcome of measuring attention is remembered from one start to the next."""

from __future__ import annotations

from echo_rt.attention.trials import AttentionShapes
from echo_rt.autotune.cache import Case, ChoicesFile, Entry

FILE = ChoicesFile("attention", lambda fields: AttentionShapes(**fields))
cache_file, entries, recall, remember = FILE.path, FILE.entries, FILE.recall, FILE.remember

__all__ = ["FILE", "Case", "Entry", "cache_file", "entries", "recall", "remember"]
