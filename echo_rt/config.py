"""What a model is: frozen dataclasses, checked when made; sizes that follow from others are properties.

A *latent frame* is one time step of the VAE's latent video, a *block* is the group of latent frames that is generated
together, a *token* is one patch of a latent frame.

Attention sees three kinds of frames: the *sink* (the first frames of the video, kept for ever), the *memory*
(a fixed number of frames' worth of tokens that evolves) and the *local window* (the most recent frames, the
block being generated included). Sources: arXiv 2606.04527 and its released recipes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo_rt.errors import ConfigError

# How the memory encoder sees the keys that leave the window.
MEMORY_READS = ("unrotated", "rotated")


def _require_positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{owner}: {name} must be a positive integer, got {value!r}")


def _require_flag(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}: {name} must be true or false, got {value!r}")


def _require_number(
    owner: str, name: str, value: object, smallest: float, largest: float, *, inside: bool = False
) -> None:
    """Require a real number from ``smallest`` to ``largest``; ``inside``: neither of the two."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and smallest <= value <= largest and not (inside and value in (smallest, largest)):  # type: ignore[operator]
        return
    if inside and largest == math.inf:
        where = f"above {smallest:g}, and finite"
    else:
        where = f"between {smallest:g} and {largest:g}" if inside else f"in {smallest:g}..{largest:g}"
    raise ConfigError(f"{owner}: {name} must be a number {where}, got {value!r}")


def _known_fields(cls: type, source: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``source`` that are fields of ``cls``, with tuples for lists, so that they can be hashed."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in source.items() if k in names}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the diffusion transformer (Wan's ``config.json``).

    Defaults are the values of Wan2.1-T2V-1.3B that its ``config.json`` does not name.
    """

    dim: int
    ffn_dim: int
    freq_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _require_positive(
            "transformer",
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            freq_dim=self.freq_dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            text_dim=self.text_dim,
            text_len=self.text_len,
        )
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise ConfigError(f"transformer: patch_size must be (1, rows, columns), got {self.patch_size}")
        _require_positive("transformer", patch_rows=self.patch_size[1], patch_columns=self.patch_size[2])
        _require_number("transformer", "eps", self.eps, 0.0, 1.0)
        if self.in_channels != self.out_channels:
            raise ConfigError(
                "transformer: a text-to-video model has as many input as output channels, "
                f"got in {self.in_channels} and out {self.out_channels}"
            )
        if self.dim % self.num_heads:
            raise ConfigError(f"transformer: dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.freq_dim % 2:
            raise ConfigError(f"transformer: freq_dim must be even, got {self.freq_dim}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ConfigError(
                f"transformer: the head size must be even and at least 6 for three rotary parts, got "
                f"dim {self.dim} / num_heads {self.num_heads} = {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head that are rotated by the frame, the row and the column."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial

    @property
    def patch_area(self) -> int:
        return self.patch_size[1] * self.patch_size[2]


@dataclass(frozen=True)
class WindowConfig:
    """What a block attends to, in latent frames, and the largest temporal RoPE id the model was trained with.

    ``sink_frames`` may be 0 without a memory. ``recache_sink``: a prompt switch whose recache reaches frame 0 leaves
    the sink with the keys and values of the new prompt; otherwise the old ones are restored.
    """

    frames_per_block: int = 3
    sink_frames: int = 3
    local_frames: int = 9
    max_temporal_id: int = 20
    recache_sink: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            "window",
            frames_per_block=self.frames_per_block,
            local_frames=self.local_frames,
            max_temporal_id=self.max_temporal_id,
        )
        sink = self.sink_frames
        if isinstance(sink, bool) or not isinstance(sink, int) or sink < 0:
            raise ConfigError(f"window: sink_frames must be an integer of 0 or more, got {sink!r}")
        _require_flag("window", "recache_sink", self.recache_sink)
        for name, frames in (("sink_frames", self.sink_frames), ("local_frames", self.local_frames)):
            if frames % self.frames_per_block:
                raise ConfigError(
                    f"window: {name} must be a multiple of frames_per_block {self.frames_per_block}, got {frames}"
                )
        # With memory the bound is tighter; ModelConfig, which knows the memory, checks that one.
        if self.sink_frames + self.local_frames > self.max_temporal_id + 1:
            raise ConfigError(
                f"window: sink_frames {self.sink_frames} + local_frames {self.local_frames} need "
                f"{self.sink_frames + self.local_frames} temporal ids, but max_temporal_id {self.max_temporal_id} "
                f"leaves {self.max_temporal_id + 1}"
            )

    @property
    def cached_frames(self) -> int:
        return self.sink_frames + self.local_frames


@dataclass(frozen=True)
class MemoryConfig:
    """The evolving memory: its size in frames of tokens, and the settings in which recipes differ.

    ``reads``: the memory encoder reads the keys of evicted frames before rotation, or rotated by the ids that these
    frames have while the block that evicts them is generated.
    """

    frames: int = 3
    layers: int = 2
    normalize_k: bool = False
    rebuild_on_prompt_switch: bool = True
    ffn_multiplier: int = 4
    reads: str = MEMORY_READS[0]

    def __post_init__(self) -> None:
        _require_positive("memory", frames=self.frames, layers=self.layers, ffn_multiplier=self.ffn_multiplier)
        for name in ("normalize_k", "rebuild_on_prompt_switch"):
            _require_flag("memory", name, getattr(self, name))
        if self.reads not in MEMORY_READS:
            raise ConfigError(f"memory: memory_reads must be one of {', '.join(MEMORY_READS)}; got {self.reads!r}")

    @property
    def reads_rotated(self) -> bool:
        return self.reads == "rotated"


@dataclass(frozen=True)
class SamplerConfig:
    """The few-step schedule: the training timesteps of the denoising steps, and the timestep of the context pass.

    ``first_block_steps``: the steps of the first generated block; empty for the same as all others.
    """

    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    timestep_shift: float = 5.0
    context_timestep: float = 0.0
    num_train_timesteps: int = 1000
    first_block_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._require_steps("denoising_steps", self.denoising_steps)
        if self.first_block_steps != ():
            self._require_steps("first_block_steps", self.first_block_steps)
        _require_number("sampler", "timestep_shift", self.timestep_shift, 0.0, math.inf, inside=True)
        _require_number("sampler", "context_timestep", self.context_timestep, 0.0, self.num_train_timesteps)

    @property
    def most_steps(self) -> int:
        """The largest number of denoising steps of any block."""
        return max(len(self.denoising_steps), len(self.first_block_steps))

    def _require_steps(self, name: str, steps: tuple[int, ...]) -> None:
        whole = isinstance(steps, tuple) and all(isinstance(s, int) and not isinstance(s, bool) for s in steps)
        valid = whole and steps and all(1 <= s <= self.num_train_timesteps for s in steps)
        if not valid or any(a <= b for a, b in itertools.pairwise(steps)):
            found = list(steps) if isinstance(steps, tuple) else steps
            raise ConfigError(
                f"sampler: {name} must be falling integers in 1..{self.num_train_timesteps}, got {found!r}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the arithmetic of a rollout: transformer, window, memory, schedule, latent size."""

    transformer: TransformerConfig
    latent_height: int
    latent_width: int
    window: WindowConfig = WindowConfig()
    memory: MemoryConfig | None = None
    sampler: SamplerConfig = SamplerConfig()

    def __post_init__(self) -> None:
        _require_positive("latent size", latent_height=self.latent_height, latent_width=self.latent_width)
        _, patch_rows, patch_columns = self.transformer.patch_size
        if self.latent_height % patch_rows or self.latent_width % patch_columns:
            raise ConfigError(
                f"latent size {self.latent_width}x{self.latent_height} is not a whole number of "
                f"{patch_columns}x{patch_rows} patches"
            )
        if self.memory is None:
            return
        window, frames = self.window, self.memory.frames
        if window.sink_frames == 0:
            raise ConfigError(
                f"window: sink_frames must be {window.frames_per_block} or more beside a memory, got 0; "
                "without a sink the memory has to be off"
            )
        if frames > window.frames_per_block:
            raise ConfigError(
                f"memory: {frames} memory frames are more than frames_per_block {window.frames_per_block}; "
                "their ids would run into the sink"
            )
        needed = window.sink_frames + frames + window.local_frames
        if needed > window.max_temporal_id + 1:
            raise ConfigError(
                f"window: sink_frames {window.sink_frames} + memory frames {frames} + local_frames "
                f"{window.local_frames} need {needed} temporal ids, but max_temporal_id {window.max_temporal_id} "
                f"leaves {window.max_temporal_id + 1}"
            )

    @classmethod
    def from_flat(cls, source: Mapping[str, Any]) -> ModelConfig:
        """Make a config of one flat JSON object, as in golden bundles and snapshots; unknown keys are ignored."""
        try:
            transformer = _known_fields(TransformerConfig, source)
            transformer.setdefault("out_channels", transformer.get("in_channels", 16))
            memory = source.get("memory")
            if memory is not None and not isinstance(memory, Mapping):
                raise ConfigError(f"memory must be an object or null, got {memory!r}")
            return cls(
                transformer=TransformerConfig(**transformer),
                latent_height=source["latent_height"],
                latent_width=source["latent_width"],
                window=WindowConfig(**_known_fields(WindowConfig, source)),
                memory=None if memory is None else MemoryConfig(**_known_fields(MemoryConfig, memory)),
                sampler=SamplerConfig(**_known_fields(SamplerConfig, source)),
            )
        except KeyError as missing:
            raise ConfigError(f"the config lacks {missing.args[0]!r}") from None
        except TypeError as error:
            raise ConfigError(f"the config does not describe a model: {error}") from None

    def to_flat(self) -> dict[str, Any]:
        """Return one flat object of plain JSON types, the inverse of :meth:`from_flat`."""
        flat: dict[str, Any] = {}
        for part in (self.transformer, self.window, self.sampler):
            flat.update(dataclasses.asdict(part))
        flat["latent_height"], flat["latent_width"] = self.latent_height, self.latent_width
        flat["memory"] = None if self.memory is None else dataclasses.asdict(self.memory)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame."""
        _, patch_rows, patch_columns = self.transformer.patch_size
        return self.latent_height // patch_rows, self.latent_width // patch_columns

    @property
    def tokens_per_frame(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def tokens_per_block(self) -> int:
        return self.window.frames_per_block * self.tokens_per_frame

    @property
    def memory_frames(self) -> int:
        return 0 if self.memory is None else self.memory.frames

    @property
    def memory_tokens(self) -> int:
        return self.memory_frames * self.tokens_per_frame

    @property
    def ring_begin(self) -> int:
        """The first row of the local ring in a KV buffer that holds memory | sink | ring."""
        return self.memory_tokens + self.window.sink_frames * self.tokens_per_frame

    @property
    def cached_tokens(self) -> int:
        """The rows of a KV buffer, which are what a block attends to once the window is full."""
        return self.ring_begin + self.window.local_frames * self.tokens_per_frame

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent frame: channels, height, width."""
        return self.transformer.in_channels, self.latent_height, self.latent_width


# Per-channel statistics of Wan2.1's latents: what the transformer sees is (latent - mean) / std.
_WAN_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VaeConfig:
    """The causal video VAE; the defaults are those of Wan2.1."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = _WAN_LATENTS_STD
    frame_rate: int = 16  # video frames a second that Wan2.1 was trained at

    def __post_init__(self) -> None:
        _require_positive("vae", base_dim=self.base_dim, z_dim=self.z_dim, num_res_blocks=self.num_res_blocks)
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ConfigError(
                f"vae: temporal_downsample must name one choice between each two of the {len(self.dim_mult)} "
                f"resolutions, got {len(self.temporal_downsample)}"
            )
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ConfigError(
                f"vae: latents_mean and latents_std must have z_dim {self.z_dim} entries, "
                f"got {len(self.latents_mean)} and {len(self.latents_std)}"
            )

    @classmethod
    def from_flat(cls, source: Mapping[str, Any]) -> VaeConfig:
        """Make a config of one flat JSON object; unknown keys are ignored."""
        return cls(**_known_fields(cls, source))

    @property
    def spatial_stride(self) -> int:
        """Video pixels per latent pixel, along a side."""
        return 1 << (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame (the first latent frame of a video decodes to one)."""
        return 1 << self.temporal_downsample.count(True)

    def video_frames(self, latent_frames: int) -> int:
        """Number of video frames that the first ``latent_frames`` latents of a stream decode to."""
        return 0 if latent_frames == 0 else 1 + self.temporal_stride * (latent_frames - 1)


@dataclass(frozen=True)
class TextEncoderConfig:
    """The umT5 encoder; the defaults are those of umT5-xxl."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_attn: int = 4096
    d_ff: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(
            "text encoder",
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_attn=self.d_attn,
            d_ff=self.d_ff,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
        )
        if self.d_attn % self.num_heads:
            raise ConfigError(f"text encoder: d_attn {self.d_attn} is not a multiple of num_heads {self.num_heads}")

    @classmethod
    def from_flat(cls, source: Mapping[str, Any]) -> TextEncoderConfig:
        """Make a config of one flat JSON object; unknown keys are ignored."""
        return cls(**_known_fields(cls, source))

    @property
    def d_kv(self) -> int:
        return self.d_attn // self.num_heads
