"""Weights on disk: opened without copying, renamed to the original names, and checked name by name."""

from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.generator import GeneratorTensors, check_memory, load_generator
from echo_rt.weights.lora import MergedLora, merge_lora
from echo_rt.weights.shapes import MemoryFacts, memory_facts

__all__ = [
    "GeneratorTensors",
    "MemoryFacts",
    "MergedLora",
    "ModelFolder",
    "check_memory",
    "check_tensors",
    "load_generator",
    "memory_facts",
    "merge_lora",
    "open_tensors",
]
