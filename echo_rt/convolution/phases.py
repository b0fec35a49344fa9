"""A 3x3 convolution behind a nearest-neighbour enlargement as four 2x2 ones of the picture that was not enlarged.

Twice as large, every pixel stands in two rows and two columns. Of the three rows that an output pixel of an even row
sees, the last two are one row of the small picture, and of an odd row the first two; so with columns. The weights of
taps that meet the same pixel add up, and of nine products four are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

# For output rows (or columns) of even and of odd number: which taps of three fall on the first and on the second of
# the two rows that are seen.
_MEETING = (((0,), (1, 2)), ((0, 1), (2,)))


def phase_weights(weight: Tensor) -> Tensor:
    """``weight [Co, C, 3, 3]`` -> ``[4, Co, 2, 2, C]``, as :meth:`echo_rt.ops.schema.Ops.upsample_conv` wants it.

    Phase 2a + b is that of rows of parity a and columns of parity b. Sums are float64, rounded once: give the weight as
    the checkpoint has it, and turn the result to the dtype of the model.
    """
    wide = weight.double()
    phases = []
    for rows in _MEETING:
        for columns in _MEETING:
            taps = [
                wide[:, :, row][..., column].sum((-2, -1)) for row in map(list, rows) for column in map(list, columns)
            ]
            phases.append(torch.stack(taps, 1).unflatten(1, (2, 2)))
    return torch.stack(phases).to(weight.dtype)
