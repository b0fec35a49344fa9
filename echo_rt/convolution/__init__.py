"""The decoder's convolutions, each by the fastest implementation on this machine.

They are selected when a decoder is loaded: :func:`select_convolutions` measures the candidates on the decoder's own
shapes and caches the result in a file.
"""

from echo_rt.convolution.backends import ConvolutionCandidate, implementations
from echo_rt.convolution.select import (
    ConvolutionSelection,
    available_convolutions,
    cache_file,
    known_selections,
    select_convolutions,
)
from echo_rt.convolution.shapes import ConvolutionShape, Prepared
from echo_rt.convolution.torch_conv import library_convolution, upsample_convolution

__all__ = [
    "ConvolutionCandidate",
    "ConvolutionSelection",
    "ConvolutionShape",
    "Prepared",
    "available_convolutions",
    "cache_file",
    "implementations",
    "known_selections",
    "library_convolution",
    "select_convolutions",
    "upsample_convolution",
]
