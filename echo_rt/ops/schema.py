"""The operations that the hand-written kernels implement, with one schema for all backends.

A backend is any object with the functions of :class:`Ops`: ``torch`` is the module :mod:`echo_rt.ops.reference`,
``emulated`` and ``cuda`` are :mod:`echo_rt.ops.kernels`. A model gets its operations when it is made, so runtimes with
different backends can live in one process.

Letters: ``F`` frames, ``S`` tokens per frame, ``n`` = F·S tokens, ``H`` heads, ``d`` head size, ``dim`` = H·d, ``L``
layers, ``M`` memory tokens, ``ct`` and ``cs`` rotary pairs of time and of rows and columns (ct + cs = d/2).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# Entries of the device-side position record that advance() writes.
POSITION_FIELDS = ("block", "first_frame", "shift", "memory_frame", "first_slot")


class Ops(Protocol):
    """One function per operation. Only tensors marked (written) are changed, in place."""

    @property
    def name(self) -> str: ...

    @staticmethod
    def rope_table(frames: Tensor, inverse_frequencies: Tensor, out: Tensor) -> None:
        """Write cosine and sine of float64 ``frames [F] · inverse_frequencies [c]`` to ``out [F, c, 2]`` (written)."""

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
        """Advance the device-side position to the next block; the host never reads it back.

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
    def merge_attention(outputs: Tensor, logsumexps: Tensor) -> Tensor:
        """Merge attention over two, three or four pieces of the keys into attention over all; returns ``[n, H·d]``.

        ``outputs [pieces, n, H, d]``; ``logsumexps`` float32 ``[pieces, H, n]``: natural logarithm of the sum of the
        exponentials of the scaled scores. A piece's weight is its share of the whole sum.
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

        ``sink_k [L, sink tokens, H, d]``; ``memory_k``, ``memory_v [M, H, d]`` are shared by all layers. Rows whose
        source is None keep their values.
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
    def modulated_layer_norm_quantize(
        x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor, eps: float
    ) -> None:
        """:meth:`modulated_layer_norm` as float8: ``out`` e4m3fn ``[n, dim]``, ``out_scale`` float32 [n] (written).

        A row's scale is its largest magnitude / 448, and ``out · out_scale`` its value: see :mod:`echo_rt.ops.float8`.
        """

    @staticmethod
    def gated_residual_norm_quantize(
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        out: Tensor,
        out_scale: Tensor,
        eps: float,
    ) -> None:
        """:meth:`gated_residual_norm` as float8: ``x [n, dim]``, ``out`` e4m3fn, ``out_scale`` [n] (written)."""

    @staticmethod
    def gelu_quantize(x: Tensor, out: Tensor, out_scale: Tensor) -> None:
        """``GELU(x [n, any])`` by its tanh formula, as float8: ``out`` e4m3fn, ``out_scale`` float32 [n] (written)."""

    @staticmethod
    def counter_noise(out: Tensor, positions: Tensor, seed: Tensor, step: int) -> None:
        """Draw standard normal noise of denoising step ``step`` of the block in ``positions`` into ``out`` (written).

        ``out`` float32, contiguous, of any shape; ``positions`` int64 [5] as :meth:`advance` writes it; ``seed`` int64
        [2], its low and high 32 bits. The noise depends only on these: see :mod:`echo_rt.ops.noise`.
        """

    @staticmethod
    def flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> None:
        """``x0 = x - sigma·flow``; x (written) becomes x0, or ``(1-sigma')·x0 + sigma'·noise`` where noise is given.

        ``x``, ``noise`` float32 and ``flow`` of one shape; ``sigmas`` float64 [2]: sigma of this step and of the next.
        """

    @staticmethod
    def rms_silu_window(
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor,
        window: Tensor,
        history: Tensor | None,
        keep: bool,
    ) -> None:
        """Write ``silu(v / max(‖v‖, 1e-12) · sqrt(C) · gamma)`` of ``v = x + bias + residual`` after a window's past.

        ``x [T, h, w, C]`` (written: becomes v, where ``keep``), ``residual`` alike; ``bias``, ``gamma`` float32 [C];
        ``window [past + T, h, w, C]`` (written). A ``history [past, h, w, C]`` (written) is copied to the window's
        past and then takes the window's last ``past`` frames; without one, the window's past keeps its values.
        """

    @staticmethod
    def frames_to_uint8(video: Tensor, out: Tensor) -> None:
        """Map ``video [F, h, w, 3]`` in [-1, 1], clamped, to 0..255, rounded to nearest: uint8 ``out`` (written)."""

    @staticmethod
    def causal_conv(window: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """Write ``bias + residual`` + the convolution of ``window`` into ``out [T, h, w, Co]`` (written).

        ``window [kT - 1 + T, h, w, C]``, past frames first, padded with zeros in space. ``weight [Co, C, kT, k, k]`` in
        torch.channels_last_3d memory, k = 1 or 3. ``bias`` float32 [Co]. ``residual`` has the shape of ``out`` and may
        be the same tensor. The stride between frames of the three may be larger than a frame.
        """

    @staticmethod
    def causal_conv_hopper(window: Tensor, weight: Tensor, out: Tensor) -> None:
        """:meth:`causal_conv` of 3x3 pixels without bias and residual, with Hopper's matrix instructions.

        ``weight [Co / 96, kT, C / 32, 9, 4, 96, 8]``: see :mod:`echo_rt.convolution.kernels`. ``out [T, h, w, Co]``
        (written).
        """

    @staticmethod
    def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write a 3x3 convolution of ``x [T, h, w, C]``, upsampled by 2, into ``out [T, 2h, 2w, Co]`` (written).

        Upsampled to the nearest pixel. ``weight [4, Co, 2, 2, C]``, see :mod:`echo_rt.convolution.torch_conv`; ``bias``
        float32 [Co]. Pixel (2y + a, 2x + b) is the bias + the sum over i and j of ``weight[2a + b, :, i, j] @
        x[t, y + a - 1 + i, x + b - 1 + j]``, with zeros around ``x``. The stride between frames of both
        may be larger than a frame.
        """


OPERATIONS = tuple(name for name, member in vars(Ops).items() if isinstance(member, staticmethod))
