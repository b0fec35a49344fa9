"""The operations that the hand-written kernels implement: one schema for all backends.

A backend is any object with the functions of :class:`Ops`: ``torch`` is the module :mod:`echo_rt.ops.reference`, which
has their signatures and says what they do, ``emulated`` and ``cuda`` are :mod:`echo_rt.ops.kernels`. A model gets its
operations when it is made, so runtimes with different backends can live in one process.
"""

from __future__ import annotations

from echo_rt.ops import reference

# Entries of the device-side position record that advance() writes.
POSITION_FIELDS = ("block", "first_frame", "shift", "memory_frame", "first_slot")


class Ops:
    """One function per operation, and the backend's name."""

    name: str
    rope_table = staticmethod(reference.rope_table)
    advance = staticmethod(reference.advance)
    qkv_norm_rope_store = staticmethod(reference.qkv_norm_rope_store)
    merge_attention = staticmethod(reference.merge_attention)
    reanchor = staticmethod(reference.reanchor)
    memory_attention = staticmethod(reference.memory_attention)
    gated_update = staticmethod(reference.gated_update)
    modulated_layer_norm = staticmethod(reference.modulated_layer_norm)
    gated_residual_norm = staticmethod(reference.gated_residual_norm)
    modulated_layer_norm_quantize = staticmethod(reference.modulated_layer_norm_quantize)
    gated_residual_norm_quantize = staticmethod(reference.gated_residual_norm_quantize)
    gelu_quantize = staticmethod(reference.gelu_quantize)
    counter_noise = staticmethod(reference.counter_noise)
    flow_step = staticmethod(reference.flow_step)
    rms_silu_window = staticmethod(reference.rms_silu_window)
    frames_to_uint8 = staticmethod(reference.frames_to_uint8)
    causal_conv = staticmethod(reference.causal_conv)
    causal_conv_hopper = staticmethod(reference.causal_conv_hopper)
    upsample_conv = staticmethod(reference.upsample_conv)


OPERATIONS = tuple(name for name, member in vars(Ops).items() if isinstance(member, staticmethod))
