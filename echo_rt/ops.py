"""The operations that the hand-written kernels implement: one schema each, whatever the backend.

:class:`Ops` is that schema, on one screen. A backend is any object that has these functions; ``torch`` is the
module :mod:`echo_rt.reference`. A model is given its operations when it is made, so two runtimes with different
backends can live in one process.

Letters: ``F`` frames, ``S`` tokens in a frame, ``n`` = F·S tokens, ``H`` heads, ``d`` head size, ``dim`` = H·d,
``L`` layers, ``M`` memory tokens, ``ct`` and ``cs`` rotary pairs that turn with time and with place (ct + cs = d/2).
"""

from __future__ import annotations

import os
from typing import Protocol, cast

from torch import Tensor

from echo_rt.errors import BackendError

BACKENDS = ("torch", "emulated", "cuda")
BACKEND_VARIABLE = "ECHO_RT_BACKEND"


class Ops(Protocol):
    """One function an operation. Tensors marked (written) are changed in place; nothing else is."""

    @property
    def name(self) -> str: ...

    @staticmethod
    def rope_table(frames: Tensor, inverse_frequencies: Tensor, out: Tensor) -> None:
        """Cosine and sine of float64 ``frames [F] · inverse_frequencies [c]`` into ``out [F, c, 2]`` (written)."""

    @staticmethod
    def advance(
        positions: Tensor,
        frames_per_block: int,
        sink_frames: int,
        local_frames: int,
        memory_frames: int,
        max_temporal_id: int,
        inverse_frequencies: Tensor,
        temporal_block: Tensor,
        temporal_anchor: Tensor,
        write_index: Tensor,
    ) -> None:
        """Step the device-side position to the next block; nothing of it is ever read back by the host.

        ``positions`` int64 [5] (written): block, its first frame, shift, the absolute frame whose angle the first
        memory frame takes, and the block's first slot in the KV buffer (memory | sink | ring, counted in frames).
        ``temporal_block [frames_per_block, ct, 2]``, ``temporal_anchor [memory_frames + sink_frames, ct, 2]``
        (written): angles of the block's frames, and of the memory and sink where the shift puts them.
        ``write_index`` int64 [tokens of a block] (written): the KV rows that the block occupies.
        """

    @staticmethod
    def qkv_norm_rope_store(
        qkv: Tensor,
        norm_q: Tensor,
        norm_k: Tensor,
        temporal: Tensor,
        spatial: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        write_index: Tensor,
        raw_k: Tensor | None,
        raw_offset: int,
        eps: float,
    ) -> Tensor:
        """RMSNorm of q and k over the whole width, 3-D rotation, store of k and v; returns q ``[n, H, d]``.

        ``qkv [n, 3·dim]``; ``norm_q``, ``norm_k`` float32 [dim]; ``temporal [F, ct, 2]``, ``spatial [S, cs, 2]``.
        The last ``m`` tokens go to rows ``write_index [m]`` of ``k_cache``, ``v_cache [rows, H, d]`` (written), and
        their keys before rotation to rows ``write_index - raw_offset`` of ``raw_k`` (written) where it is given.
        """

    @staticmethod
    def reanchor(
        kv: Tensor,
        temporal_anchor: Tensor,
        spatial: Tensor,
        sink_k: Tensor | None,
        memory_k: Tensor | None,
        memory_v: Tensor | None,
        memory_tokens: int,
    ) -> None:
        """Rotate sink and memory keys from their unrotated copies into ``kv [L, 2, rows, H, d]`` (written).

        ``sink_k [L, sink tokens, H, d]``; ``memory_k``, ``memory_v [M, H, d]`` are shared by all layers. What is
        None stays as it is.
        """

    @staticmethod
    def memory_attention(q: Tensor, norm_q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
        """Attention of ``RMSNorm(q [M, dim])`` over ``k``, ``v [any, H, d]``, no mask, no rotation; ``[M, dim]``."""

    @staticmethod
    def gated_update(
        old: Tensor,
        candidate: Tensor,
        norm: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        out: Tensor,
        eps: float,
    ) -> None:
        """``c = RMSNorm(candidate)``, ``g = sigmoid([old; c] @ gate_weight.T + gate_bias)``, ``out = g·old + (1-g)·c``.

        ``old``, ``candidate``, ``out`` (written) ``[M, dim]``; ``gate_weight [dim, 2·dim]``.
        """

    @staticmethod
    def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """``LayerNorm(x [n, dim]) · scale + shift``, float32 ``scale``, ``shift [dim]`` (the 1+ is in the scale)."""

    @staticmethod
    def gated_residual_norm(
        x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> Tensor:
        """``x += gate · y`` (written; no gate: 1), then returns ``LayerNorm(x) · scale + shift [n, dim]``."""

    @staticmethod
    def flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> None:
        """``x0 = x - sigma·flow``; x (written) becomes x0, or ``(1-sigma')·x0 + sigma'·noise`` where noise is given.

        ``x``, ``noise`` float32 and ``flow`` of one shape; ``sigmas`` float64 [2]: sigma of this step and of the next.
        """

    @staticmethod
    def rms_silu_window(x: Tensor, gamma: Tensor, window: Tensor, past: int) -> None:
        """``silu(x / max(‖x‖, 1e-12) · sqrt(C) · gamma)``, x ``[T, h, w, C]``, to ``window[past:past+T]`` (written)."""

    @staticmethod
    def frames_to_uint8(video: Tensor, out: Tensor) -> None:
        """``video [F, h, w, 3]`` in [-1, 1] (clamped) to 0..255, rounded to nearest, into uint8 ``out`` (written)."""


def available_backends() -> dict[str, str]:
    """Backend name -> ``"available"``, or why it is not and what to do about it."""
    absent = "not part of this version; use the torch backend"
    return {"torch": "available", "emulated": absent, "cuda": absent}


def load_ops(backend: str | None = None) -> Ops:
    """The operations of ``backend``; None means the environment's ``ECHO_RT_BACKEND``, or ``torch``.

    Raises :class:`BackendError` for a backend that is unknown or not there: there is no fallback.
    """
    backend = backend or os.environ.get(BACKEND_VARIABLE) or "torch"
    if backend not in BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    status = available_backends()[backend]
    if status != "available":
        raise BackendError(f"backend {backend!r} is not available: {status}")
    from echo_rt import reference

    return cast(Ops, reference)
