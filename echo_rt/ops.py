"""The operations that the hand-written kernels implement: one schema each, whatever the backend.

:class:`Ops` is that schema, on one screen. A backend is any object that has these functions; ``torch`` is the
module :mod:`echo_rt.reference`, ``emulated`` and ``cuda`` are :mod:`echo_rt.kernels`. A model is given its operations
when it is made, so two runtimes with different backends can live in one process.

Letters: ``F`` frames, ``S`` tokens in a frame, ``n`` = F·S tokens, ``H`` heads, ``d`` head size, ``dim`` = H·d,
``L`` layers, ``M`` memory tokens, ``ct`` and ``cs`` rotary pairs that turn with time and with place (ct + cs = d/2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from echo_rt.build_info import __version__
from echo_rt.errors import BackendError
from echo_rt.wording import plain

BACKENDS = ("torch", "emulated", "cuda")
# Entries of the device-side position record that advance() writes.
POSITION_FIELDS = ("block", "first_frame", "shift", "memory_frame", "first_slot")
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
    def merge_attention(outputs: Tensor, logsumexps: Tensor) -> Tensor:
        """Attention to all keys, ``[n, H·d]``, from attention to two, three or four pieces of them.

        ``outputs [pieces, n, H, d]``; ``logsumexps`` float32 ``[pieces, H, n]``: the natural logarithm of the sum of
        the exponentials of the scaled scores. A piece weighs as much as its part of the whole sum.
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
    def modulated_layer_norm_quantize(
        x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor, eps: float
    ) -> None:
        """:meth:`modulated_layer_norm` as float8: ``out`` e4m3fn ``[n, dim]``, ``out_scale`` float32 [n] (written).

        A row's scale is its largest magnitude / 448, and ``out · out_scale`` its value: see :mod:`echo_rt.float8`.
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
        """Standard normal noise of denoising step ``step`` of the block in ``positions``, into ``out`` (written).

        ``out`` float32, contiguous, of any shape; ``positions`` int64 [5] as :meth:`advance` writes it; ``seed`` int64
        [2], its low and its high 32 bits. What is made depends on these alone: see :mod:`echo_rt.noise`.
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
        """``v = x + bias + residual``, then ``silu(v / max(‖v‖, 1e-12) · sqrt(C) · gamma)`` after a window's past.

        ``x [T, h, w, C]`` (written: becomes v, where ``keep``), ``residual`` alike; ``bias``, ``gamma`` float32 [C];
        ``window [past + T, h, w, C]`` (written). With a ``history [past, h, w, C]`` (written) the window's past is
        what it remembers, and it remembers the window's last ``past`` frames from then on; without one, the window's
        past stays as it is.
        """

    @staticmethod
    def frames_to_uint8(video: Tensor, out: Tensor) -> None:
        """``video [F, h, w, 3]`` in [-1, 1] (clamped) to 0..255, rounded to nearest, into uint8 ``out`` (written)."""

    @staticmethod
    def causal_conv(window: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """``bias + residual`` + the convolution of ``window``, into ``out [T, h, w, Co]`` (written).

        ``window [kT - 1 + T, h, w, C]``, past frames first; zeros are around it in space. ``weight [Co, C, kT, k, k]``
        in torch.channels_last_3d memory, k = 1 or 3. ``bias`` float32 [Co]. ``residual`` has the shape of ``out``
        and may be it. Frames of the three may lie apart.
        """

    @staticmethod
    def causal_conv_hopper(window: Tensor, weight: Tensor, out: Tensor) -> None:
        """:meth:`causal_conv` of 3x3 pixels without bias and residual, on matrix products that Hopper alone has.

        ``weight [Co / 96, kT, C / 32, 9, 4, 96, 8]``: see :mod:`echo_rt.convolution.hopper`. ``out [T, h, w, Co]``
        (written).
        """

    @staticmethod
    def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """A 3x3 convolution of ``x [T, h, w, C]`` made twice as large, into ``out [T, 2h, 2w, Co]`` (written).

        Larger by nearest pixels. ``weight [4, Co, 2, 2, C]``, see :mod:`echo_rt.convolution.phases`; ``bias``
        float32 [Co]. Pixel (2y + a, 2x + b) is the bias + the sum over i and j of ``weight[2a + b, :, i, j] @
        x[t, y + a - 1 + i, x + b - 1 + j]``, with zeros around ``x``. Frames of both may lie apart.
        """


def available_backends() -> dict[str, str]:
    """Backend name -> ``"available"``, or why it is not and what to do about it.

    ``emulated`` are the CUDA kernels executed on the host, for tests and for those who change them; they are slow.
    """
    built = _kernels_built()
    return {"torch": "available", "emulated": _emulated_status(built), "cuda": _cuda_status(built)}


def _kernels_built() -> tuple[str, str]:
    """What the kernels were compiled for, and ""; or "" and why they cannot be had."""
    rebuild = "install echo-rt again: pip install --no-build-isolation ."
    try:
        import echo_rt._ops as _ops
    except ModuleNotFoundError:
        return "", (
            "this build has no kernels, as torch was not there when it was compiled (or ECHO_RT_BUILD was none); with "
            f"torch, setuptools, pybind11 and a C++ compiler installed, {rebuild}"
        )
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        return "", f"the kernels do not load: {reason}; they may be compiled for another torch: {rebuild}"
    if __version__ != _ops.VERSION:
        return "", f"the kernels are those of version {_ops.VERSION}, and this is {__version__}; {rebuild}"
    # torch keeps its C++ interface from patch to patch, not from one minor version to the next.
    compiled, found = (version.split(".")[:2] for version in (_ops.TORCH, torch.__version__))
    if compiled != found:
        return "", f"the kernels were compiled with torch {_ops.TORCH}, and this is {torch.__version__}; {rebuild}"
    return _ops.BACKEND, ""


def _emulated_status(built: tuple[str, str]) -> str:
    backend, problem = built
    if backend == "cuda":
        return "this build has the kernels for the GPU instead; ECHO_RT_BUILD=emulated when installing chooses"
    return problem or "available"


def _cuda_status(built: tuple[str, str]) -> str:
    backend, problem = built
    if torch.version.cuda is None:
        return f"needs a CUDA build of torch, and this is {torch.__version__}; install one, then echo-rt again"
    if backend == "emulated":
        return "this build has the emulated kernels; with nvcc on the PATH (or CUDA_HOME set), install echo-rt again"
    if problem:
        return problem
    return "available" if torch.cuda.is_available() else "torch sees no GPU; install an NVIDIA driver, see nvidia-smi"


def load_ops(backend: str) -> Ops:
    """The operations of ``backend``.

    Raises :class:`BackendError` for a backend that is unknown or not there: there is no fallback.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    status = available_backends()[backend]
    if status != "available":
        raise BackendError(f"backend {backend!r} is not available: {status}")
    if backend == "torch":
        from echo_rt import reference

        return cast(Ops, reference)
    from echo_rt.kernels import Kernels

    return Kernels()


@dataclass(frozen=True)
class Backend:
    """The operations that a model is given, and why these.

    ``by_name``: whether its user asked for them; ``fallback``: whether they are torch's for want of kernels on a GPU.
    """

    ops: Ops
    reason: str
    by_name: bool = False
    fallback: bool = False

    @property
    def name(self) -> str:
        """As :data:`BACKENDS` has it."""
        return self.ops.name


def choose_backend(
    requested: str | None,
    device: torch.device,
    *,
    memory: tuple[torch.dtype, int] | None = None,
    prescribed: str | None = None,
) -> Backend:
    """The backend named ``requested``, else that of the snapshot to go on with, ``prescribed``, else the environment's.

    None of these: ``cuda`` where ``device`` is a GPU that the kernels were built for, ``torch`` elsewhere, and where
    the kernels do not update the memory. ``memory``: dtype and head size of one that evolves, None where none does.
    Raises :class:`BackendError` where the one that was named cannot be had or does not run: nothing else takes its
    place.
    """
    if requested is not None:
        return Backend(_able(requested, device, memory), "asked for by name", by_name=True)
    if prescribed is not None:
        try:
            return Backend(_able(prescribed, device, memory), "as in the snapshot")
        except BackendError as error:
            raise BackendError(
                f"{error}. The snapshot's video was made with it; "
                "name another with backend= (--backend) to go on, rounded otherwise"
            ) from error
    if named := os.environ.get(BACKEND_VARIABLE):
        try:
            return Backend(_able(named, device, memory), f"{BACKEND_VARIABLE} names it")
        except BackendError as error:
            raise BackendError(f"{BACKEND_VARIABLE}: {error}") from error
    if device.type != "cuda":
        return Backend(load_ops("torch"), f"the device is {device}")
    try:
        ops = _able("cuda", device, None)
        obstacle = "" if memory is None else memory_obstacle(ops, *memory)
    except BackendError as error:
        obstacle = str(error)
    if obstacle:
        return Backend(load_ops("torch"), obstacle, fallback=True)
    return Backend(ops, f"the kernels are built for {device}")


def _able(name: str, device: torch.device, memory: tuple[torch.dtype, int] | None) -> Ops:
    """The operations of ``name``, which run there; :class:`BackendError` where they do not."""
    ops = load_ops(name)
    check_device(ops, device)
    if memory is not None:
        check_memory(ops, *memory)
    return ops


def memory_obstacle(ops: Ops, dtype: torch.dtype, head_dim: int) -> str:
    """Why the backend has no memory update for ``dtype`` and head size, or ""."""
    if ops.name == "torch":
        return ""
    from echo_rt.kernels import HEAD_SIZES

    if dtype != torch.float32 and head_dim in HEAD_SIZES:
        return ""
    return (
        f"backend {ops.name!r} updates the memory in bfloat16 or float16 with heads of {HEAD_SIZES}, "
        f"got {plain(dtype)} and {head_dim}"
    )


def check_memory(ops: Ops, dtype: torch.dtype, head_dim: int) -> None:
    """Raises :class:`BackendError` where the backend has no memory update for ``dtype`` and head size.

    Asked when a model is loaded: the update itself comes blocks later.
    """
    if obstacle := memory_obstacle(ops, dtype, head_dim):
        raise BackendError(f"{obstacle}; choose memory 'prior' or 'off', or backend 'torch'")


def check_device(ops: Ops, device: torch.device) -> None:
    """Raises :class:`BackendError` where the backend's operations cannot run on ``device``.

    Asked when a model is loaded: a GPU that the kernels were not compiled for would refuse the first launch.
    """
    needed = {"emulated": "cpu", "cuda": "cuda"}.get(ops.name, device.type)
    if device.type != needed:
        raise BackendError(
            f"backend {ops.name!r} runs on device {needed!r}, got {str(device)!r}; choose another of them"
        )
    if ops.name == "cuda":
        _check_architecture(device)


def _check_architecture(device: torch.device) -> None:
    import echo_rt._ops as _ops

    major, minor = torch.cuda.get_device_capability(device)
    built = _ops.CUDA_ARCHS.split()
    if not any(_runs_on(architecture, major, minor) for architecture in built):
        raise BackendError(
            f"this build has kernels for {', '.join(f'sm_{a}' for a in built)}, and {device} is sm_{major}{minor}; "
            "where this GPU is visible, install echo-rt again: pip install --no-build-isolation ."
        )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether machine code for ``"80"`` or ``"90a"`` runs on a GPU; there is no PTX that a driver could translate."""
    number = int(architecture.rstrip("a"))
    if architecture.endswith("a"):
        return number == 10 * major + minor
    return number // 10 == major and number % 10 <= minor
