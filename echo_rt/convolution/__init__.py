"""The decoder's convolutions, each in the way that is fastest here.

A decoder is given its convolutions when it is loaded, as a model is given its attention: :func:`choose_convolutions`
measures what there is, on the decoder's own shapes, and remembers the outcome in a file.
"""

from echo_rt.convolution.causal import library_convolution
from echo_rt.convolution.choice import Choice, available_convolutions, choose_convolutions, known_choices
from echo_rt.convolution.enlarging import enlarged_convolution
from echo_rt.convolution.kinds import CONVOLUTION_NAMES, Kind, kinds
from echo_rt.convolution.prepared import Prepared
from echo_rt.convolution.remembered import cache_file
from echo_rt.convolution.shapes import ConvolutionShape

__all__ = [
    "CONVOLUTION_NAMES",
    "Choice",
    "ConvolutionShape",
    "Kind",
    "Prepared",
    "available_convolutions",
    "cache_file",
    "choose_convolutions",
    "enlarged_convolution",
    "kinds",
    "known_choices",
    "library_convolution",
]
