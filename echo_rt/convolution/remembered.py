"""The file in which the outcome of measuring convolutions is remembered from one start to the next."""

from __future__ import annotations

from echo_rt.autotune.cache import ChoicesFile
from echo_rt.convolution.shapes import ConvolutionShape

FILE = ChoicesFile("convolution", ConvolutionShape.from_fields)
cache_file = FILE.path
